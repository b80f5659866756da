"""Runs on the first node after a job's tasks: ``python -m cluster.slurm.epilogue SPEC.json CODE``.

If node 0's task was killed, it could not record the end of this start; the job is then requeued as after any failure.
"""

from __future__ import annotations

import logging
import os
import sys

from cluster.slurm.restart_budget import FAILED, RestartBudget
from cluster.slurm.slurm_env import read_slurm_env
from cluster.slurm.task import log, read_spec
from graphkd.errors import UserError


def main() -> None:
    """Exit with the exit code of the tasks."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spec, code = read_spec(), int(sys.argv[2])
    os.environ.setdefault("SLURM_NODEID", "0")
    budget = RestartBudget(spec.run_folder, read_slurm_env(), spec.site)
    if spec.ray and budget.has_no_end():
        reason = f"the task of node 0 was killed (exit code {code})"
        budget.record_end(FAILED, reason)
        try:
            budget.requeue(reason)
        except UserError as error:
            log.error("%s", error)
    sys.exit(code)


if __name__ == "__main__":
    main()
