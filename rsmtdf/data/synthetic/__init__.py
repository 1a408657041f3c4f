"""The synthetic world: procedural aerial scenes with LoveDA's classes, written in LoveDA's own layout."""

from rsmtdf.data.synthetic.materials import CLASSES, PALETTE
from rsmtdf.data.synthetic.plan import WORLD_VERSION
from rsmtdf.data.synthetic.world import World, WorldFiles, write_world

__all__ = ["CLASSES", "PALETTE", "WORLD_VERSION", "World", "WorldFiles", "write_world"]
