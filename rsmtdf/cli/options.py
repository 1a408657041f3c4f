"""Options that several commands share, once each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf.objects import store_path

StoreOut = Annotated[
    Any,
    typer.Option("--out", metavar="STORE", parser=store_path, help="The feature store: a folder or s3://bucket/name."),
]
StoreIn = Annotated[
    Any,
    typer.Argument(metavar="STORE", parser=store_path, help="A feature store: a folder or s3://bucket/name."),
]
DatasetName = Annotated[
    str | None, typer.Option("--dataset", help="A shipped configuration by name (rsmtdf configs ls).")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Your own configuration (rsmtdf init writes one).")]
Root = Annotated[
    Path | None, typer.Option("--root", help="Folder of the images; else $RSMTDF_DATA/<name>, else as recorded.")
]
Labels = Annotated[
    str | None,
    typer.Option("--labels", help="Labelled set: all, a share (5%), a number of tiles (20), or a list file."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override one value; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
TeacherNames = Annotated[
    list[str] | None, typer.Option("--teacher", help="Only this teacher of the configuration, or a preset; repeatable.")
]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Strong views per tile: auto (up to 10), or a number.")]
WeakViews = Annotated[
    str | None, typer.Option("--weak-views", help="Weak views per labelled tile: auto (64 to 1000), or a number.")
]
MaxGb = Annotated[float | None, typer.Option("--max-gb", help="Size limit of the store; default half the free space.")]
Codec = Annotated[
    str | None, typer.Option("--codec", help="How features are kept: int8 (default), int4 (half of it), fp16 (twice).")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="What the teachers compute in: float32, bfloat16 or float16 (as configured)."),
]
Devices = Annotated[
    str | None, typer.Option("--devices", help="A process for each of these devices: cuda:0,cuda:1 or all.")
]
Processes = Annotated[
    int | None, typer.Option("--processes", metavar="N", help="So many processes, all on --device (for CPUs).")
]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="Dask workers: tcp://HOST:PORT, local, cuda, or a FILE.yaml for a batch system."),
]
ShardRange = Annotated[
    str | None,
    typer.Option("--shard-range", metavar="I/N", help="Only piece I (from 0) of N of the store: for job arrays."),
]
Init = Annotated[
    bool, typer.Option("--init", help="Prepare the store (views, statistics) for others to fill; compute nothing.")
]
Workers = Annotated[int | None, typer.Option("--workers", help="Threads that decode and make views.")]
PoolTiles = Annotated[
    int | None, typer.Option("--pool", metavar="N", help="Strong views of N tiles only, drawn by key; default all.")
]
Calibrate = Annotated[
    bool, typer.Option("--calibrate/--no-calibrate", help="Measure times on the device; without, they are left out.")
]
StorePixels = Annotated[
    bool, typer.Option("--store-pixels", help="Keep the views' pixels too: training then decodes no image.")
]
