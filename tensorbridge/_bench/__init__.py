"""`python -m tensorbridge bench`: what conversions cost on this machine, and what the alternatives would cost.

    _measure   the stopwatch: interleaved rounds, rotated order, checks
    _rows      questions as data;  _calls, _promises, _copies, _trees, _loops, _cuda: the questions
    _machine   what was measured on
    _results   the record, verdicts on goals, results.json
    _report, _plots, _compare   the record for a person
    _command   the command line

Imports frameworks freely, in the rows; nothing else in the package imports it.
"""

from tensorbridge._bench._command import add_arguments, main

__all__ = ["add_arguments", "main"]
