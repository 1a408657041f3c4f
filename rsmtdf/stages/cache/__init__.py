"""Stage 1: run the frozen teachers once over every (tile, augmentation seed) and keep their patch tokens.

`grow_store` writes down which views the store shall hold, `add_teachers` measures what codecs need, and `fill_store`
computes the missing features.
"""

from rsmtdf.stages.cache.fill import CacheReport, add_teachers, fill_store
from rsmtdf.stages.cache.grow import grow_store, stored_params, view_maker

__all__ = ["CacheReport", "add_teachers", "fill_store", "grow_store", "stored_params", "view_maker"]
