"""Results of an evaluation on a card."""

from __future__ import annotations

from exl2ray.evaluate.record import Evaluation

START, END = "<!-- exl2ray: evaluation -->", "<!-- exl2ray: end of evaluation -->"


def evaluation_section(evaluation: Evaluation | None) -> str:
    """Markdown between two comments, by which ``with_evaluation`` finds it again; empty between them for None."""
    if evaluation is None:
        return f"{START}\n{END}"
    e, before = evaluation, evaluation.reference_perplexity
    source = "-" if before is None else before.text("#.4g", ".2g")
    rows = [f"| perplexity | {e.perplexity.text('#.4g', '.2g')} | {source} |"]
    if e.kl is not None:
        rows.append(f"| KL divergence from the source (nats per token) | {e.kl.text('.4f')} | 0 |")
    if e.top1 is not None:
        rows.append(f"| top-1 agreement with the source | {e.top1.text('.2%')} | 100% |")
    table = "\n".join(["| | this model | source model |", "|---|---|---|", *rows])
    what = f"Evaluated on {e.predictions} predictions in {e.rows} rows of {e.length} tokens, ± standard error over rows."
    return f"{START}\n## Evaluation\n\n{what}\n\n{table}\n{END}"


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """``card`` with its evaluation replaced; below everything else on a card that has no place for one."""
    section = evaluation_section(evaluation)
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        return f"{before}{section}{after}"
    return f"{card.rstrip()}\n\n{section}\n"
