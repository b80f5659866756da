"""After the tasks of a job: ``python -m cluster.slurm.epilogue SPEC.json CODE``, run by the script on its first node.

Where node 0's task was killed, nobody wrote down how the job ended; then it is queued again as after any crash.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from cluster.slurm.restart_budget import FAILED, RestartBudget
from cluster.slurm.slurm_env import read_slurm_env
from cluster.slurm.spec import JobSpec
from cluster.slurm.task import requeue_within_budget
from graphkd.errors import UserError

log = logging.getLogger("graphkd.cluster")


def main() -> None:
    """End with the tasks' exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    spec, code = JobSpec.model_validate_json(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    os.environ.setdefault("SLURM_NODEID", "0")
    place = read_slurm_env()
    budget = RestartBudget(spec.run_folder, place)
    if spec.ray and budget.is_open():
        why = f"the task of node 0 was killed (exit code {code})"
        budget.record_end(FAILED, why)
        try:
            requeue_within_budget(budget, spec, place, why)
        except UserError as error:
            log.error("%s", error)
    sys.exit(code)


if __name__ == "__main__":
    main()
