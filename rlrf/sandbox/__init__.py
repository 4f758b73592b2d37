"""Running programs that nobody trusts: the protocol, the checkers, and the pool.

A backend (``docker``, ``bubblewrap``, ``process``, any entry point of ``rlrf.sandboxes``) runs a
program on inputs and reports what came out. It never sees an expected output: verdicts are computed
on the host, by a :class:`Checker`. What comes out of a sandbox is data, never code: it is parsed as
JSON and capped, nothing is unpickled or evaluated.

::

    async with open_sandbox("auto") as pool:
        report = await pool.run(Program(code), [StdinCase("2 3", "5")])
    report.verdict          # Verdict.ACCEPTED

A failure of the machinery is no verdict: it is retried and then raised as
:class:`rlrf.InfraError`.

It does not wall anything off itself. What a backend does not protect from is in its
:attr:`SandboxInfo.guarantee` and in docs/security.md.

Why: design/verdicts.md.
"""

from rlrf.sandbox.checkers import (
    Asserts,
    Checker,
    Exact,
    Lines,
    Returns,
    Text,
    Tokens,
    accepted,
)
from rlrf.sandbox.pool import (
    PoolStats,
    SandboxPool,
    open_sandbox,
    sandboxes,
    start_sandbox,
)
from rlrf.sandbox.program import (
    MISSING,
    AssertCase,
    CallCase,
    Case,
    CaseResult,
    Job,
    Limit,
    Limits,
    Program,
    ProgramError,
    RawRun,
    RunReport,
    Sandbox,
    SandboxInfo,
    StdinCase,
    Verdict,
)

__all__ = [
    "MISSING",
    "AssertCase",
    "Asserts",
    "CallCase",
    "Case",
    "CaseResult",
    "Checker",
    "Exact",
    "Job",
    "Limit",
    "Limits",
    "Lines",
    "PoolStats",
    "Program",
    "ProgramError",
    "RawRun",
    "Returns",
    "RunReport",
    "Sandbox",
    "SandboxInfo",
    "SandboxPool",
    "StdinCase",
    "Text",
    "Tokens",
    "Verdict",
    "accepted",
    "open_sandbox",
    "sandboxes",
    "start_sandbox",
]
