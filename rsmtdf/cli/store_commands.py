"""`rsmtdf cache ...`: the care of a feature store. Bodies only, as in `main`."""

from __future__ import annotations

from typing import Annotated

import typer

from rsmtdf.cli.options import ConfigFile, Device, Json, Root, StoreIn
from rsmtdf.cli.terminal import show

cache_app = typer.Typer(no_args_is_help=True, help="Look into a feature store, and take care of it.")


@cache_app.command("info")
def cache_info(store: StoreIn, as_json: Json = False) -> None:
    """What a store holds: views by stream and seed, teachers, completeness, sizes, identity."""
    from rsmtdf.cli.stores import store_info

    result, text = store_info(store)
    show(result, as_json=as_json, text=text)


@cache_app.command("verify")
def cache_verify(
    store: StoreIn,
    live: Annotated[int, typer.Option("--live", min=0, help="Also run the teachers again on this many views.")] = 0,
    root: Root = None,
    config: ConfigFile = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every stored byte, changing nothing. Exit code 1 if anything is damaged."""
    from rsmtdf.cli.care import Means, verify_store
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        means = Means(root=root, config=config, device=device)
        result, text = verify_store(store, live=live, means=means, stop=stop)
    show(result, as_json=as_json, text=text)
    if not result["sound"]:
        raise typer.Exit(1)


@cache_app.command("repair")
def cache_repair(
    store: StoreIn,
    root: Root = None,
    config: ConfigFile = None,
    device: Device = "auto",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Threads that make views.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    withdraw_only: Annotated[
        bool, typer.Option("--withdraw-only", help="Mark damaged views to be computed again, and stop.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every stored byte, and compute again exactly the views that are damaged or missing.

    Exit code 1 if something could not be repaired.
    """
    from rsmtdf.cli.care import Means, repair_store
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        means = Means(root=root, config=config, device=device, workers=workers)
        result, text = repair_store(store, means=means, stop=stop, dry_run=dry_run, withdraw_only=withdraw_only)
    show(result, as_json=as_json, text=text)
    if result["failed"]:
        raise typer.Exit(1)
