"""The laboratory on the command line.

python notebooks/lab check CONFIG.json [--field value ...]    # before training: will it work?
python notebooks/lab report runs/NAME                         # report.md, .json, .png of a run
python notebooks/lab compare SPEC.json --seeds 5 --workers 2  # what is missing; SPEC.png, table
python notebooks/lab train --method RULE [--field value ...]  # by a paper's rule, or a method
python notebooks/lab tables                                   # tiny_configs/evidence/README.md
python notebooks/lab figures [NAME ...]                       # notebooks/figures, or some of it
"""

import csv
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder's: it has no lab in it

import json  # noqa: E402

import lab  # noqa: E402
import opd  # noqa: E402

COMMANDS = "check [CONFIG.json], report RUN, compare SPEC.json, train, tables or figures"
EVIDENCE = opd.HERE / "tiny_configs/evidence"


def check(words: list[str], fields: dict) -> None:
    """What `lab.check` says of a config: its numbers, then the decision and its reasons."""
    opd.require(len(words) < 2, f"{' '.join(words)!r}: check takes at most one CONFIG.json")
    verdict = lab.check(opd.Config.load(*words, **fields))
    print(json.dumps(verdict.numbers, indent=1))
    print(f"\n{verdict.decision}\n", *verdict.reasons, sep="\n")


def report(words: list[str], fields: dict) -> None:
    """Write a run's report."""
    opd.require(len(words) == 1 and not fields, "report: takes one folder, runs/NAME")
    lab.report(words[0])
    print(f"{words[0]}/report.md")


def compare(words: list[str], fields: dict) -> None:
    """Run what is missing of a comparison, print its table, write SPEC.png."""
    numbers = {
        name: str(fields.pop(name, default)) for name, default in (("seeds", 5), ("workers", 2))
    }
    fine = len(words) == 1 and not fields and all(text.isdigit() for text in numbers.values())
    opd.require(fine, "compare: takes SPEC.json, and --seeds N and --workers N")
    summary = lab.compare(words[0], int(numbers["seeds"]), int(numbers["workers"]))
    about = lab.load_spec(words[0])["about"]
    print(f"{about}\n\n{lab.markdown_table(summary)}")
    lab.style()
    lab.plot_comparison(summary, about).savefig(Path(words[0]).with_suffix(".png"), dpi=110)


def train(words: list[str], fields: dict) -> None:
    """Train by a rule."""
    opd.require(
        not words and "method" in fields, "train: needs --method RULE, and takes fields only"
    )
    rule, resume = fields.pop("method"), fields.pop("resume", None)
    opd.require(
        resume is None or not fields, f"resume = {resume!r}: takes --method and no other field"
    )
    run = lab.train(rule, resume=resume, **fields)
    for who in ("student_before", "student_after", "teacher"):
        if test := run.result[who]:
            told = "accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}), greedy {greedy:.3f}"
            print(f"{who.replace('_', ' '):<15}", told.format(**test))
    print(f"see {run.dir}/curve.png, samples.txt; next: python notebooks/lab report {run.dir}")


def page() -> str:
    """All comparisons as one page: what each asks, its table, and what it says."""
    text = (EVIDENCE / "head.md").read_text()
    for path in sorted(EVIDENCE.glob("*.json")):
        if path.name.endswith(".results.json"):
            continue
        spec, summary = lab.load_spec(path), lab.evidence(path)
        old = any("edition" not in run for each in summary.values() for run in each["runs"])
        note = "**First edition's numbers, not run again yet.** " * old + spec["says"]
        text += f"\n## {path.stem}\n\n{spec['about']}.\n\n{lab.markdown_table(summary)}\n"
        text += f"\n{note.strip()}\n" * bool(note.strip()) + f"\n![{path.stem}]({path.stem}.png)\n"
    return text + against_the_first()


def against_the_first() -> str:
    """Every accuracy that was run again, beside the first edition's; moved: the intervals part."""
    text = (EVIDENCE / "second.md").read_text()
    with (EVIDENCE / "first_edition.csv").open() as file:
        for row in csv.DictReader(file):
            new = lab.evidence(EVIDENCE / f"{row['comparison']}.json")[row["variant"]]
            if any("edition" not in run for run in new["runs"]):
                continue
            old, within, (now, half) = float(row["accuracy"]), float(row["half"]), new["accuracy"]
            moved = "moved" if abs(now - old) > half + within else ""
            first = f"{float(row['lr']):g} | {old:.3f} ± {within:.3f}"
            second = f"{new['lr']:g} | {now:.3f} ± {half:.3f}"
            text += f"| {row['comparison']} | {row['variant']} | {first} | {second} | {moved} |\n"
    return text


def tables(words: list[str], fields: dict) -> None:
    """Write the page of all comparisons."""
    opd.require(not words and not fields, "tables: takes nothing")
    (EVIDENCE / "README.md").write_text(page())
    print(EVIDENCE / "README.md")


def figures(words: list[str], fields: dict) -> None:
    """Make the pictures of the course."""
    import figures as pictures  # notebooks/figures

    wrong = sorted({*words} - {*pictures.FIGURES})
    opd.require(not wrong and not fields, f"{wrong}: must be of {', '.join(pictures.FIGURES)}")
    for name in words or pictures.FIGURES:
        pictures.FIGURES[name](pictures.FOLDER / name)
        print(pictures.FOLDER / name)


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 training stopped, 2 bad input, 3 no teacher, 130 interrupted."""
    commands = dict(check=check, report=report, compare=compare, train=train)
    commands |= dict(tables=tables, figures=figures)
    codes = {opd.InputError: 2, opd.TrainingStopped: 1, opd.TeacherUnreachable: 3}
    codes[KeyboardInterrupt] = 130
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        print(__doc__)
        return 0
    try:
        words, fields = opd.parse(argv)
        opd.require(words and words[0] in commands, f"{' '.join(argv)!r}: must be {COMMANDS}")
        commands[words[0]](words[1:], fields)
    except tuple(codes) as error:
        print("lab:", (str(error) or "interrupted").split("\n")[0], file=sys.stderr)
        return codes[type(error)]
    return 0


if __name__ == "__main__":
    sys.exit(main())
