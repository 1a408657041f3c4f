"""Training methods: one small file each, and one entry in `METHODS`."""

from rsmtdf.learning.methods.fixmatch import fixmatch
from rsmtdf.learning.methods.rs_mtdf import rs_mtdf
from rsmtdf.learning.methods.supervised import supervised
from rsmtdf.learning.methods.terms import LossFunction, Method, MethodConfig, StepTerms

__all__ = ["METHODS", "LossFunction", "Method", "MethodConfig", "StepTerms"]

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="supervised", loss=supervised, needs_unlabelled=False, needs_targets=False),
        Method(name="fixmatch", loss=fixmatch, needs_unlabelled=True, needs_targets=False),
        Method(name="rs-mtdf", loss=rs_mtdf, needs_unlabelled=True, needs_targets=True),
    )
}
