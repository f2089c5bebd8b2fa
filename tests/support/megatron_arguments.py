"""Ask Megatron's own parser and checks about lists of flags: a JSON list of ``{"world", "flags"}`` on stdin, answers on stdout.

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
    from counterflow.options import add_flags
    from counterflow.platform import install_cpu

    # Which flags are allowed depends on what Transformer Engine is there.
    install_cpu(engine=True)
    import torch
    from megatron.training import arguments

    # The checks ask what the GPU can do.
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    answers = []
    for case in json.load(sys.stdin):
        os.environ["WORLD_SIZE"] = str(case["world"])
        os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "32" if "--use-megatron-fsdp" in case["flags"] else "1"
        sys.argv = ["pretrain_gpt.py", *case["flags"]]
        said, reason = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                args = arguments.parse_args(add_flags)
                arguments.validate_args(args)
                arguments.core_transformer_config_from_args(args)
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error} {said.getvalue()[-300:] if isinstance(error, SystemExit) else ''}"
        answers.append(reason)
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
