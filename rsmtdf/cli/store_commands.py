"""`rsmtdf cache ...`: the care of a feature store. Bodies only, as in `main`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf.cli.options import ConfigFile, Device, Json, Root, StoreIn
from rsmtdf.cli.terminal import confirmed, say, show
from rsmtdf.objects import store_path

cache_app = typer.Typer(no_args_is_help=True, help="Look into a feature store, and take care of it.")

Workers = Annotated[int, typer.Option("--workers", min=1, help="Shards in work at a time.")]


@cache_app.command("info")
def cache_info(
    store: StoreIn,
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Draw some views beside their features (PCA as colours) into this file."),
    ] = None,
    views: Annotated[int, typer.Option("--views", min=1, max=64, help="Views to draw.")] = 4,
    root: Root = None,
    as_json: Json = False,
) -> None:
    """What a store holds: views by stream and seed, teachers, completeness, sizes, identity.

    Example: rsmtdf cache info feats.zarr --png features.png
    """
    from rsmtdf.cli.info import draw_features, store_info

    result, text = store_info(store)
    show(result, as_json=as_json, text=text)
    if png is not None:
        say(draw_features(store, png, views=views, root=root))


@cache_app.command("recode")
def cache_recode(
    src: Annotated[Any, typer.Argument(parser=store_path, help="A feature store; it is only read.")],
    dst: Annotated[Any, typer.Argument(parser=store_path, help="The new store, or one that this command has begun.")],
    codec: Annotated[str, typer.Option("--codec", help="int8, int4 or fp16.")],
    teacher: Annotated[
        list[str] | None, typer.Option("--teacher", help="Only this teacher's features; repeatable.")
    ] = None,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Copy a store under another codec, row by row: runs may go on with either. Exit code 1 if views are damaged.

    Example: rsmtdf cache recode feats.zarr small.zarr --codec int8
    """
    from rsmtdf.cli.store_changes import recode_store
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        result, text = recode_store(src, dst, codec=codec, teachers=teacher, threads=workers, stop=stop)
    show(result, as_json=as_json, text=text)
    if result["damaged"]:
        raise typer.Exit(1)


@cache_app.command("merge")
def cache_merge(
    store: Annotated[Any, typer.Argument(parser=store_path, help="The feature store that grows.")],
    source: Annotated[
        Any, typer.Argument(parser=store_path, help="Another one with the same kind of views; it is only read.")
    ],
    recode: Annotated[
        bool, typer.Option("--recode", help="Encode features anew where codec or channel statistics differ.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be added, and stop.")] = False,
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Add to a store what another has and it lacks: seeds, tiles, teachers. Exit code 1 if views are damaged.

    Stores merge without --recode where one was made with: cache-features --stats-from OTHER
    """
    from rsmtdf.cli.store_changes import merge_stores
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        result, text = merge_stores(store, source, recode=recode, dry_run=dry_run, threads=workers, stop=stop)
    show(result, as_json=as_json, text=text)
    if result["damaged"]:
        raise typer.Exit(1)


@cache_app.command("rm")
def cache_rm(
    store: StoreIn,
    teacher: Annotated[str | None, typer.Option("--teacher", help="The teacher to remove.")] = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="Remove the stored pixels; features stay.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="The augmentation seed to remove.")] = None,
    stream: Annotated[str, typer.Option("--stream", help="Of the seed: strong, weak or plain.")] = "strong",
    generation: Annotated[int | None, typer.Option("--generation", help="Only this generation of the seed.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a teacher, the views of a seed, or the stored pixels, and give their disk back. Asks first.

    Example: rsmtdf cache rm feats.zarr --seed 9
    """
    from rsmtdf.cli.store_changes import removal_plan, remove_from_store
    from rsmtdf.signals import stop_flag

    plan = removal_plan(
        store, teacher=teacher, pixels=pixels, seed=seed, stream=stream, generation=generation, dry_run=dry_run
    )
    if plan and dry_run:
        show(plan[0], as_json=as_json, text=plan[1])
        return
    if plan:
        say(plan[1])
        if not (yes or confirmed("remove it?", instead="--yes")):
            say("nothing was removed")
            return
    with stop_flag() as stop:
        result, text = remove_from_store(
            store, teacher=teacher, pixels=pixels, seed=seed, stream=stream, generation=generation, stop=stop
        )
    show(result, as_json=as_json, text=text)
    if result["left"]:
        raise typer.Exit(1)


@cache_app.command("verify")
def cache_verify(
    store: StoreIn,
    live: Annotated[int, typer.Option("--live", min=0, help="Also run the teachers again on this many views.")] = 0,
    root: Root = None,
    config: ConfigFile = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check every stored byte, changing nothing. Exit code 1 if anything is damaged.

    With --live, also whether the teachers still say what is stored, for which it needs them and the images.
    Example: rsmtdf cache verify feats.zarr --live 8
    """
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

    Needs the images and the teachers, from the store's own record. Exit code 1 if something could not be repaired.
    Example: rsmtdf cache repair feats.zarr --dry-run
    """
    from rsmtdf.cli.care import Means, repair_store
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        means = Means(root=root, config=config, device=device, workers=workers)
        result, text = repair_store(store, means=means, stop=stop, dry_run=dry_run, withdraw_only=withdraw_only)
    show(result, as_json=as_json, text=text)
    if result["failed"]:
        raise typer.Exit(1)
