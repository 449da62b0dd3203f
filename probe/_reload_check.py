"""Run as a script in a fresh process: load an exported directory with transformers alone and write out its logits.

Reads one JSON object from standard input (see `probe._export`). It imports nothing of this package, so that what it
sees is what any user of the directory sees.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    order = json.load(sys.stdin)
    torch.set_num_threads(order["threads"])
    torch.set_float32_matmul_precision(order["matmul_precision"])
    model = AutoModelForCausalLM.from_pretrained(order["directory"], **order["settings"]).to(order["device"]).eval()
    batch = {name: ids.to(order["device"]) for name, ids in load_file(order["inputs"]).items()}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, order["outputs"])


if __name__ == "__main__":
    main()
