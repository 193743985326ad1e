"""Tensor parallelism of transformers' own models: each rank has the slopes and bias of the heads that it holds."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from hf_models import other_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from swat_flex.hf import swat_attention


@pytest.mark.parametrize("bias", [None, {"logit_bias": "unit", "assumed_length": 9}], ids=["no bias", "unit"])
@pytest.mark.parametrize("slopes", ["balanced", "alibi", "3:1", None])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_the_slopes_and_bias_of_its_heads(rank, slopes, bias):
    module = other_model("Llama", swat_flex={"slopes": slopes, **(bias or {})}).model.layers[0].self_attn
    q, k, v = torch.randn(3, 1, 4, 9, 8, dtype=torch.float64).unbind()
    whole, _ = swat_attention(module, q, k[:, ::2], v[:, ::2], None)
    mine = slice(2 * rank, 2 * rank + 2)
    with pytest.raises(NotImplementedError, match=r"query: expected config\.num_attention_heads = 4 heads"):
        swat_attention(module, q[:, mine], k[:, 2 * rank, None], v[:, 2 * rank, None], None)
    dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())  # no other process is needed
    try:
        weight = distribute_tensor(module.q_proj.weight, init_device_mesh("cpu", (2,)), [Shard(0)], src_data_rank=None)
        module.q_proj.weight = torch.nn.Parameter(weight)
        part, _ = swat_attention(module, q[:, mine], k[:, 2 * rank, None], v[:, 2 * rank, None], None)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(part, whole[:, :, mine], rtol=0, atol=1e-12)


PROGRAM = """
import sys, torch, swat_flex.hf
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2))
x = torch.arange(1, 27).view(2, 13)
print("loss", model(x, labels=x).loss.item())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_have_the_loss_of_one(tmp_path):
    model = other_model("Llama", dtype=torch.float32)
    x = torch.arange(1, 27).view(2, 13)
    loss = model(x, labels=x).loss.item()
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    said = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")]
    assert len(said) == 2, done.stderr
    assert said == pytest.approx([loss, loss], abs=1e-4)
