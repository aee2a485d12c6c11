"""``penstock models``, ``penstock hardware``, ``penstock policies``: what is built in, and where it comes from."""

from __future__ import annotations

from penstock.cli.options import JsonFile


def models(json: JsonFile = None) -> None:
    """List the built-in models with their source."""
    from rich import box
    from rich.table import Table

    from penstock.cli.show import Show
    from penstock.perf.kv import kv_bytes_per_token
    from penstock.perf.models import model_names, model_spec

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Model", "Parameters", "Active", "Layers", "KV per token", "Source"):
        table.add_column(title, justify="left" if title in ("Model", "Source") else "right", overflow="fold")
    rows = []
    for name in model_names():
        m = model_spec(name)
        kv = kv_bytes_per_token(m)
        row = {"name": name, "parameters": m.params(), "active_parameters": m.active_params(), "layers": m.layers}
        rows.append(row | {"kv_bytes_per_token": kv, "source": m.source})
        figures = (
            f"{m.params() / 1e9:.1f} G",
            f"{m.active_params() / 1e9:.1f} G",
            str(m.layers),
            f"{kv / 1024:.0f} KiB",
        )
        table.add_row(name, *figures, m.source)
    show = Show(json_path=json)
    show.print(table, "Any other: give --model the path of its config.json.")
    show.json(rows)


def hardware(json: JsonFile = None) -> None:
    """List the built-in accelerators with their source."""
    from rich import box
    from rich.table import Table

    from penstock.cli.show import Show
    from penstock.perf.hardware import hardware_names, hardware_spec

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    titles = ("Hardware", "bf16 TFLOP/s", "Memory GiB", "TB/s", "Link GB/s", "NIC GB/s", "TDP W", "Source")
    for title in titles:
        table.add_column(title, justify="left" if title in ("Hardware", "Source") else "right", overflow="fold")
    rows = []
    for name in hardware_names():
        h = hardware_spec(name)
        row = {"name": name, "full_name": h.full_name, "flops": h.flops, "memory_bytes": h.memory_bytes}
        row |= {"bandwidth_Bps": h.bandwidth_Bps, "scale_up": h.scale_up, "scale_up_Bps": h.scale_up_Bps}
        row |= {"idle_w": h.power.idle_w, "memory_w": h.power.memory_w, "dynamic_w": h.power.dynamic_w}
        row |= {"clocks_mhz": list(h.clocks_mhz)}
        rows.append(row | {"pcie_Bps": h.pcie_Bps, "nic_Bps": h.nic_Bps, "tdp_w": h.tdp_w, "sources": h.sources})
        table.add_row(
            name,
            f"{h.flops['bf16'] / 1e12:.0f}",
            f"{h.memory_bytes / 2**30:.0f}",
            f"{h.bandwidth_Bps / 1e12:.2f}",
            f"{h.scale_up_Bps / 1e9:.0f} {h.scale_up}",
            f"{h.nic_Bps / 1e9:.0f}",
            f"{h.tdp_w:.0f}",
            h.sources.get("bandwidth_Bps", ""),
        )
    show = Show(json_path=json)
    show.print(table)
    show.json(rows)


def policies(json: JsonFile = None) -> None:
    """List the policies and their options, with where each default comes from."""
    import msgspec
    from rich import box
    from rich.table import Table

    from penstock.cli.show import Show
    from penstock.policy.registry import PRESETS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Policy", "Option", "Default", "Origin", "What it is"):
        table.add_column(title, justify="right" if title == "Default" else "left")
    rows = []
    for name, preset in PRESETS.items():
        table.add_row(f"[bold]{name}[/bold]", "", "", "", preset.summary)
        for option in preset.options:
            default = option.default if isinstance(option.default, str) else f"{option.default:g}"
            words = f" ({', '.join(option.words)})" if option.words else ""
            table.add_row("", option.name, default, option.origin, option.help + words)
        options = [
            {key: value for key, value in _plain(option).items() if value not in ((), [])} for option in preset.options
        ]
        row = {"name": name, "summary": preset.summary, "disaggregated": preset.disaggregated}
        rows.append(row | {"predictor": preset.predictor, "options": options})
    show = Show(json_path=json)
    show.print(table)
    show.json(msgspec.to_builtins(rows))


def _plain(option: object) -> dict[str, object]:
    import math

    import msgspec

    found: dict[str, object] = msgspec.to_builtins(option)
    bounds = ("low", "high")
    return {k: None if k in bounds and isinstance(v, float) and math.isinf(v) else v for k, v in found.items()}
