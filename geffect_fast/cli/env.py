"""`geffect-fast env`."""

from __future__ import annotations


def env() -> None:
    """Print versions, devices, threads, and the provider that serves each op, with the reason."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from geffect_fast import __version__
    from geffect_fast.ops.backend import build_info, providers
    from geffect_fast.ranks import here

    print(f"geffect-fast  {__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "transformers", "numpy", "xarray", "h5netcdf", "pyarrow", "datasets"):
        try:
            print(f"{name:<13} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<13} not installed")
    print(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set")
    number = os.environ.get("OMP_NUM_THREADS", "not set")
    print(f"threads       OMP_WAIT_POLICY {waiting}, OMP_NUM_THREADS {number}")
    ranks = here()
    if ranks.size > 1:
        print(f"ranks         {ranks.size}, backends {ranks.backends}")
    for i in range(torch.cuda.device_count()):
        print(f"cuda:{i}        {torch.cuda.get_device_name(i)}")
    if not torch.cuda.is_available():
        print("cuda          none")
    info = build_info()
    for key, value in info.items():
        print(f"build         {key}: {value}")
    if not info:
        print("build         no information")
    print()
    rows = [("op", "device", "provider", "why"), *map(tuple, providers())]
    width = max(len(op) for op, *_ in rows)
    for op, device, provider, why in rows:
        print(f"{op:<{width}} {device:<7} {provider:<10} {why}")
