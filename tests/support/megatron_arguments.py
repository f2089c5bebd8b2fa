"""Ask Megatron's own parser and checks, and counterflow's, about flags: a JSON list of ``{"world", "flags"}`` on stdin, answers
on stdout.

An answer is None, or why the flags were refused. Runs in a process of its own: Megatron's parser leaves global state behind.
"""

import contextlib
import io
import json
import os
import sys
import warnings


def main() -> None:
    warnings.simplefilter("ignore")
    os.environ["RANK"] = "0"
    from counterflow.options import add_flags, merge_options, read_flags
    from counterflow.platform import install_cpu
    from counterflow.platform.engine import read_capability

    # Which flags are allowed depends on what Transformer Engine is there.
    install_cpu(engine=True)
    import torch
    from megatron.training import arguments

    from counterflow.megatron.checks import prepare_arguments

    # The checks ask what the GPU can do.
    torch.cuda.get_device_capability = lambda device=None: read_capability()
    answers = []
    for case in json.load(sys.stdin):
        os.environ["WORLD_SIZE"] = str(case["world"])
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if "--use-megatron-fsdp" in case["flags"] else "1"
        sys.argv = ["pretrain_gpt.py", *case["flags"]]
        said, reason = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                args = arguments.parse_args(add_flags)
                # The stand-in has no FP4 casts and refuses them.
                if "--fp4-format" not in case["flags"]:
                    prepare_arguments(args, merge_options(read_flags(case["flags"])))
                arguments.validate_args(args)
                arguments.core_transformer_config_from_args(args)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error} {said.getvalue()[-300:] if isinstance(error, SystemExit) else ''}"
        answers.append(reason)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
