"""The page, the plots and README's table of a GPU report: report.json as text and pictures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured yet"
Content = Mapping[str, Any]
Row = Mapping[str, Any]


def benches(content: Content) -> Iterator[tuple[str, Content]]:
    """Op and report of each bench that ran."""
    for part in content.get("parts", ()):
        if part["part"].startswith("bench-") and part["findings"].get("results"):
            yield part["part"].removeprefix("bench-"), part["findings"]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def ratios(rows: Sequence[Row]) -> list[float]:
    return [row["speed_against_best_peer"] for row in rows if "speed_against_best_peer" in row]


def device(content: Content) -> str:
    facts = content["machine"]
    return (
        f"{facts.get('gpu', 'no GPU')}, driver {facts.get('driver', '-')}, CUDA {facts.get('cuda', '-')}, "
        f"torch {facts.get('torch', '-')}, {facts['started'][:10]}"
    )


def page(content: Content) -> str:
    lines = ["# GPU report", "", device(content), ""]
    if content["synthetic"]:
        lines += ["**A dry run: the times below are made up.**", ""]
    lines += ["| part | | s | |", "|---|---|---|---|"]
    for part in content.get("parts", ()):
        detail = part["detail"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {part['part']} | {part['status']} | {part['seconds']:.0f} | {detail} |")
    for part in content.get("parts", ()):
        if part["part"] == "tests" and part["findings"]:
            lines += ["", *_tests(part["findings"])]
        if part["part"] == "host" and part["findings"]:
            lines += ["", "## Host time", ""]
            rows = [row for row in part["findings"]["results"] if "median" in row]
            lines += [f"- {row['name']}: {1e6 * row['median']:.1f} us" for row in rows]
        if part["part"] == "model" and part["findings"]:
            lines += ["", "## Training steps", ""]
            lines += [_step(row) for row in part["findings"]["results"]]
        if part["part"] == "overlap" and part["findings"]:
            lines += ["", *_overlap(part["findings"])]
    for op, report in benches(content):
        lines += ["", *_bench(op, report)]
    return "\n".join(lines) + "\n"


def _tests(findings: Content) -> list[str]:
    passed, failed, skipped = findings["passed"], findings["failed"], findings["skipped"]
    lines = ["## Tests", "", f"{passed} passed, {len(failed)} failed, {skipped} skipped"]
    return [*lines, *(f"- failed: {name}" for name in failed), *(f"- {text}" for text in findings["reasons"])]


def _step(row: Row) -> str:
    text = f"- {row['name']}: {1e3 * row['median']:.1f} ms, {row['tokens_per_s']:.0f} tokens/s"
    text += f", at most {row['peak_gib']:.2f} GiB"
    if "speed_against_peer" in row:
        text += f", {row['speed_against_peer']:.2f} of BF16's speed"
    return text


def _overlap(findings: Content) -> list[str]:
    lines = ["## A GEMM beside dispatch", "", findings["machine"]["note"], ""]
    lines += ["| a call of | alone, us | beside the other, us | slower by |", "|---|---|---|---|"]
    for row in findings["results"]:
        times = f"{1e6 * row['alone']:.1f} | {1e6 * row['median']:.1f}"
        lines.append(f"| {row['name']} | {times} | {100 * row['slowdown']:.1f} % |")
    hits = findings["machine"].get("l2", {"left_out": "the part ended before"})
    if "left_out" in hits:
        return [*lines, "", f"Hit rate of L2: not measured, {hits['left_out']}."]
    lines += ["", "| | of the SMs' lookups L2 had |", "|---|---|"]
    lines += [f"| {name} | {100 * rate:.1f} % |" for name, rate in hits["rates"].items()]
    return [*lines, f"| both at once, if neither disturbed the other | {100 * hits['apart']:.1f} % |"]


def _bench(op: str, report: Content) -> list[str]:
    facts, rows = report["machine"], report["results"]
    ceilings = f"copy {facts['copy_bytes_per_s'] * 1e-12:.2f} TB/s"
    if "fp8_flops_per_s" in facts:
        ceilings += f", FP8 {facts['fp8_flops_per_s'] * 1e-12:.0f} TFLOPS"
    lines = [f"## {op}", "", f"Cold L2, medians. Ceilings measured in this run: {ceilings}.", ""]
    if facts.get("note"):
        lines += [facts["note"], ""]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [*_table([row for row in rows if row["group"] == group]), ""]
    return lines[:-1]


def _table(rows: Sequence[Row]) -> list[str]:
    """One group: ours, what it reaches, each peer's time, and how fast ours is against the best of them."""
    of_row = [[*row.get("peers", ()), *row.get("left_out", ())] for row in rows]
    peers = list(dict.fromkeys(name for names in of_row for name in names))
    payload = "payload_gbytes_per_s_an_sm"
    extra = ["payload GB/s an SM"] if any(payload in row for row in rows) else []
    head = [rows[0]["group"], "us", "TFLOPS", "GB/s", "of floor", *extra]
    head += [*(f"{peer} us" for peer in peers), "speed"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    reasons: dict[str, str] = {}
    for row in rows:
        name = row["name"].removeprefix(row["group"]).strip()
        if "error" in row:
            lines.append(f"| {name} | {row['error'].replace('|', '/')} |" + " |" * (len(head) - 2))
            continue
        cells = [name, f"{1e6 * row['median']:.1f}", f"{row['tflops']:.0f}", f"{row['gbytes_per_s']:.0f}"]
        cells.append(f"{100 * row['of_floor']:.0f} %")
        if extra:
            cells.append(f"{row[payload]:.1f}" if payload in row else "-")
        for peer in peers:
            cells.append(f"{1e6 * row['peers'][peer]:.1f}" if peer in row["peers"] else "-")
            if peer in row["left_out"]:
                reasons.setdefault(peer, f"{row['left_out'][peer]} ({name})")
        cells.append(f"{row['speed_against_best_peer']:.2f}" if "speed_against_best_peer" in row else "-")
        lines.append(f"| {' | '.join(cells)} |")
    found = ratios(rows)
    if found:
        lines += ["", f"Geometric mean of the speed against the best peer: {geometric_mean(found):.3f}"]
    hops = dict.fromkeys(tuple(row["bytes_by_hop"].items()) for row in rows if "bytes_by_hop" in row)
    if hops:
        counted = (", ".join(f"{hop} {count * 1e-9:.3f} GB" for hop, count in of_hop) for of_hop in hops)
        lines += ["", "Read and written in a call, in the order of the rows:", ""]
        lines += [f"- {text}" for text in counted]
    if reasons:
        lines += ["", *(f"- {peer} was left out: {reason}" for peer, reason in reasons.items())]
    return lines


def plot(content: Content, out: Path) -> None:
    """roofline.png and ratios.png; neither without a measured row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    title = "made-up times of a dry run" if content["synthetic"] else device(content)
    reports = [
        (op, report["machine"], rows)
        for op, report in benches(content)
        if (rows := [row for row in report["results"] if "median" in row])
    ]
    if not reports:
        return

    figure, axes = pyplot.subplots(figsize=(8, 5))
    facts = reports[0][1]
    bandwidth, peak = facts["copy_bytes_per_s"], facts.get("fp8_flops_per_s", math.inf)
    for op, _, rows in reports:
        dots = [row for row in rows if row["flops"]]
        intensity = [row["flops"] / row["bytes"] for row in dots]
        if dots:
            axes.scatter(intensity, [row["tflops"] for row in dots], s=14, label=op)
    low, high = 10, 10000
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.plot(xs, [min(x * bandwidth, peak) * 1e-12 for x in xs], color="gray", label="ceilings, measured")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOPS", title=title)
    axes.legend()
    figure.savefig(out / "roofline.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)

    bars = [(f"{op} {row['name']}", row) for op, _, rows in reports for row in rows if ratios([row])]
    if not bars:
        return
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.2 * len(bars)))
    values = [row["speed_against_best_peer"] for _, row in bars]
    colors = ["tab:green" if value >= 1 else "tab:red" for value in values]
    axes.barh([f"{name} ({row['best_peer']})" for name, row in bars], values, color=colors)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="speed against the best peer", title=title)
    figure.savefig(out / "ratios.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def readme_table(content: Content | None) -> str:
    """What README says of speed on a GPU: the newest kept report, or that there is none."""
    if content is None:
        return f"On a GPU: {NOT_MEASURED}."
    lines = [f"{device(content)}; cold L2, medians, peers in the same run.", ""]
    lines += ["| | rows | of floor | speed against the best peer | at worst |", "|---|---|---|---|---|"]
    for op, report in benches(content):
        rows = [row for row in report["results"] if "median" in row]
        for group in dict.fromkeys(row["group"] for row in rows):
            of_group = [row for row in rows if row["group"] == group]
            floor, found = geometric_mean([row["of_floor"] for row in of_group]), ratios(of_group)
            name = group if group.startswith(op) else f"{op}, {group}"
            speeds = [f"{geometric_mean(found):.2f}", f"{min(found):.2f}"] if found else ["no peer", ""]
            lines.append(f"| {name} | {len(of_group)} | {100 * floor:.0f} % | {' | '.join(speeds)} |")
    return "\n".join(lines)
