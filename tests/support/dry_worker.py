"""A dry run in a fork of a process that has imported Megatron (`forked_ranks`); its job is the argument."""

import json
from typing import Any

from counterflow.megatron.dry_run import child


def run(job: dict[str, Any]) -> None:
    print(json.dumps(child.run_job(job)))
