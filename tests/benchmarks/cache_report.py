"""Tables and plot of cache_policies.py."""

import os


def percent(value):
    return f"{100 * value:.1f}"


def markdown(options, lines, paper):
    """The tables, as they are committed."""
    steps = f"the first {options.steps} steps" if options.steps else "all steps"
    parts = ["# Policies of the cluster cache", "",
             f"Trace: `{os.path.basename(options.trace)}`; {steps}, seed {options.seed}.", "",
             *_checks(options, lines), "",
             "## Hit rate over size", "", *_main_table(lines), "",
             "## The paper's cache: what the last steps selected", "", *_paper_table(paper)]
    if any(line["others"] for line in lines):
        title = f"## Other policies, where LRU is more than {options.points:g} points below Belady"
        parts += ["", title, "", *_other_tables(options, lines)]
    return "\n".join(parts) + "\n"


def _checks(options, lines):
    checked = [line["product"] for line in lines if line["product"]]
    if not checked:
        return ["No size of these is one that the product has."]
    difference = max(product["difference"] for product in checked)
    return [f"{len(checked)} sizes were replayed by the product too. It chose the same tokens, and "
            "its hit rate and bytes in every layer are the simulated ones, "
            + (f"to {difference:.0e}." if difference else "exactly.")]


def _size(line):
    times = line["tokens"] / line["budget"]
    return f"{times:.3g} ×" + (f" ({line['size']})" if line["size"] in ("least", "auto") else "")


def _main_table(lines):
    out = []
    for preset in dict.fromkeys(line["preset"] for line in lines):
        columns = ["budget", "cache", "hit rate", "worst layer", "product", "Belady", "worst layer",
                   "gap", "widest gap of a layer", "LRU", "Belady, bypass", "bound", "KiB/step"]
        out += [f"Preset `{preset}`:", "", "| " + " | ".join(columns) + " |",
                "|" + "---:|" * len(columns)]
        for line in (line for line in lines if line["preset"] == preset):
            gaps = [line["belady_layers"][layer] - rate
                    for layer, rate in line["our_layers"].items()]
            product = percent(line["product"]["hit_rate"]) if line["product"] else "-"
            out.append(
                f"| {line['budget']:,} | {_size(line)} | {percent(line['ours'])} | "
                f"{percent(min(line['our_layers'].values()))} | {product} | "
                f"{percent(line['belady'])} | {percent(min(line['belady_layers'].values()))} | "
                f"{percent(line['belady'] - line['ours'])} | {percent(max(gaps))} | "
                f"{percent(line['lru'])} | {percent(line['bypass'])} | {percent(line['bound'])} | "
                f"{line['kib_per_step']:.1f} |")
        out.append("")
    return out[:-1]


def _paper_table(paper):
    columns = ["budget", "steps kept", "hit rate", "worst layer", "tokens held, mean", "most",
               "product with the most", "reads, of the product's"]
    out = ["| preset | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for line in paper:
        held = [f"{line[name] / line['budget']:.2f} ×" for name in ("mean_tokens", "most_tokens")]
        out.append(f"| {line['preset']} | {line['budget']:,} | {line['steps']} | "
                   f"{percent(line['hit_rate'])} | {percent(line['worst'])} | {held[0]} | "
                   f"{held[1]} | {percent(line['ours'])} | {line['read']:.2f} |")
    return out


def _other_tables(options, lines):
    """Points below Belady; and what is read from the host store."""
    lines = [line for line in lines if line["others"]]
    policies = [entry["policy"] for entry in lines[0]["others"]]
    head = ["| preset | budget | cache | " + " | ".join(policies) + " |",
            "|---|---:|---:|" + "---:|" * len(policies)]

    def table(cell):
        rows = []
        for line in lines:
            bypass = ", bypass" if line["others"][0]["bypass"] else ""
            cells = " | ".join(cell(entry) for entry in line["others"])
            rows.append(f"| {line['preset']} | {line['budget']:,} | {_size(line)}{bypass} | "
                        f"{cells} |")
        return head + rows

    def gap(entry):
        knows = entry["policy"].startswith("Belady")  # the future
        close = entry["gap"] * 100 <= options.points and not knows
        text = f"**{percent(entry['gap'])}**" if close else percent(entry["gap"])
        return f"{text} ({percent(min(entry['ranges']))} to {percent(max(entry['ranges']))})"

    text = (f"Points below Belady; in brackets the least and the most of {options.ranges} equal "
            "ranges of steps; bold: within the limit. Bypass: Belady and the others may evict a "
            "step's own clusters; LRU keeps them.")
    return [text, "", *table(gap), "",
            "Tokens read from the host store, as a ratio to LRU's:", "",
            *table(lambda entry: f"{entry['read']:.2f}")]


def plot(path, lines, paper):
    """Hit rate over size, a panel a preset; the only part that needs matplotlib."""
    import matplotlib  # pylint: disable=import-outside-toplevel

    matplotlib.use("Agg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "clusterkv"})
    from matplotlib import pyplot  # pylint: disable=import-outside-toplevel

    presets = list(dict.fromkeys(line["preset"] for line in lines))
    figure, panels = pyplot.subplots(1, len(presets), figsize=(5.2 * len(presets), 4.4),
                                     sharey=True, squeeze=False)
    for panel, preset in zip(panels[0], presets):
        budgets = list(dict.fromkeys(line["budget"] for line in lines if line["preset"] == preset))
        for number, budget in enumerate(budgets):
            mine = [line for line in lines if (line["preset"], line["budget"]) == (preset, budget)]
            sizes = [line["tokens"] / budget for line in mine]
            panel.plot(sizes, [100 * line["ours"] for line in mine], "o-", ms=3, color=f"C{number}",
                       label=f"product, budget {budget}")
            panel.plot(sizes, [100 * line["lru"] for line in mine], ":", color=f"C{number}")
            panel.plot(sizes, [100 * line["belady"] for line in mine], "--", color=f"C{number}")
            kept = [line for line in paper if (line["preset"], line["budget"]) == (preset, budget)]
            panel.plot([line["mean_tokens"] / budget for line in kept],
                       [100 * line["hit_rate"] for line in kept], "x", color=f"C{number}")
        panel.plot([], [], "--", color="grey", label="Belady")
        panel.plot([], [], ":", color="grey", label="LRU")
        panel.plot([], [], "x", color="grey", label="last 1, last 2 steps (mean tokens)")
        panel.set_title(f"preset {preset}")
        panel.set_xlabel("cache, in budgets")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("hit rate, %")
    panels[0][-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    pyplot.close(figure)
