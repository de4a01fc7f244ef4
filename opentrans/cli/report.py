"""One self-contained HTML page from result files of ``opentrans bench``: plots and sortable tables,
losing rows included. All files must come from one machine."""

from __future__ import annotations

import argparse

from .render import Output, check_writable, write_atomically

SUMMARY = "one HTML page from benchmark results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans report``."""
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="result files, or directories of them"
    )
    parser.add_argument(
        "-o", "--output", default="report.html", metavar="FILE", help="default report.html"
    )
    parser.add_argument(
        "--base", metavar="BASE", help="an earlier result file or directory: shows before and after"
    )


def run(options: argparse.Namespace, out: Output) -> int:
    """Write the page; 0."""
    check_writable(options.output)
    from opentrans_kernels.bench.compare import compare, load_results
    from opentrans_kernels.report import results_page

    results = load_results(options.results)
    changes = compare(load_results([options.base]), results) if options.base else None
    write_atomically(options.output, results_page(results, changes))
    out.text(f"wrote {options.output} from {len(results)} result files", whole=True)
    return 0
