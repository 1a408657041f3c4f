"""`rsmtdf cache ...`: the care of a feature store. Bodies only, as in `main`."""

from __future__ import annotations

import typer

from rsmtdf.cli.options import Json, StoreIn
from rsmtdf.cli.terminal import show

cache_app = typer.Typer(no_args_is_help=True, help="Look into a feature store, and take care of it.")


@cache_app.command("info")
def cache_info(store: StoreIn, as_json: Json = False) -> None:
    """What a store holds: views by stream and seed, teachers, completeness, sizes, identity."""
    from rsmtdf.cli.stores import store_info

    result, text = store_info(store)
    show(result, as_json=as_json, text=text)


@cache_app.command("repair")
def cache_repair(store: StoreIn, as_json: Json = False) -> None:
    """Check every stored byte, and mark what is damaged to be computed again. Exit code 1 if anything was.

    It recomputes nothing: afterwards, run cache-features as when the store was made.
    """
    from rsmtdf.cli.stores import repair_store
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        result, text = repair_store(store, stop=stop)
    show(result, as_json=as_json, text=text)
    if not result["sound"]:
        raise typer.Exit(1)
