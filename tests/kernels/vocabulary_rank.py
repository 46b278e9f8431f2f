"""One rank of a vocabulary that several share: results and gradients beside those of the whole one.

python vocabulary_rank.py FOLDER RANK WORLD
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from swift_dist.kernels.linear_cross_entropy import linear_cross_entropy, linear_logps, reference

ROWS, WIDTH, VOCABULARY = 11, 16, 24


def main(folder: str, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(size, WIDTH, generator=generator, dtype=torch.float64) for size in (ROWS, VOCABULARY)]
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    part = slice(rank * VOCABULARY // world, (rank + 1) * VOCABULARY // world)

    def compare(ours, theirs) -> None:
        """Both map (hidden, weight) to a scalar."""
        hidden, weight = whole[0].clone().requires_grad_(), whole[1][part].clone().requires_grad_()
        right = [tensor.clone().requires_grad_() for tensor in whole]
        found, expected = ours(hidden, weight), theirs(*right)
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(hidden.grad, right[0].grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(weight.grad, right[1].grad[part], rtol=0, atol=1e-12)

    for softcap in (None, 2.0):
        options = {"softcap": softcap, "group": dist.group.WORLD, "rows": 4}

        def logps(hidden, weight, options=options):
            logp, lse = linear_logps(hidden, weight, labels, **options)
            return (logp * 0.3 + lse.square()).sum()

        def right_logps(hidden, weight, softcap=softcap):
            logp, lse = reference(hidden, weight, labels, softcap=softcap)
            return (logp * 0.3 + lse.square()).sum()

        def loss(hidden, weight, options=options):
            return 2 * linear_cross_entropy(hidden, weight, labels, z_loss=0.1, **options)

        def right_loss(hidden, weight, softcap=softcap):
            logp, lse = reference(hidden, weight, labels, softcap=softcap)
            return 2 * (-logp + 0.1 * lse.square()).sum()

        compare(logps, right_logps)
        compare(loss, right_loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
