"""Stage 1: run the frozen teachers once over every (tile, augmentation seed) and keep their patch tokens.

`plan_growth` says which views a store lacks, `grow_store` writes them down, `add_teachers` measures what codecs need,
and `fill_store` computes the missing features. `store_pixels` keeps the views themselves beside them.
"""

from rsmtdf.stages.cache.add import add_teachers
from rsmtdf.stages.cache.fill import fill_shards, fill_store
from rsmtdf.stages.cache.grow import Addition, covered, grow_store, plan_growth, stored_params, view_maker
from rsmtdf.stages.cache.pixels import PixelReport, store_pixels, without_pixels
from rsmtdf.stages.cache.report import CacheReport, LedgerRow
from rsmtdf.stages.cache.size import choose_batch

__all__ = [
    "Addition",
    "CacheReport",
    "LedgerRow",
    "PixelReport",
    "add_teachers",
    "choose_batch",
    "covered",
    "fill_shards",
    "fill_store",
    "grow_store",
    "plan_growth",
    "store_pixels",
    "stored_params",
    "view_maker",
    "without_pixels",
]
