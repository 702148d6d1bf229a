"""Metrics between two sets of features, and between two pictures. Pure functions; specs and sources in each docstring.

Letters in shape comments: N M pictures of the two sets, D features, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Moments:
    """Mean and covariance of rows that come in parts, in float64 (Chan's pairwise update).

    Attributes:
        n: rows seen.
        mean: [D].
        scatter: [D, D], sum of the outer products of the rows' distances to the mean.
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Compute the moments of rows [N, D]."""
        rows = rows.double().cpu()
        mean = rows.mean(dim=0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def __add__(self, other: "Moments") -> "Moments":
        n, step = self.n + other.n, other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.n * other.n / n)
        return Moments(n, self.mean + step * (other.n / n), scatter)

    @property
    def covariance(self) -> Tensor:
        """[D, D], with the divisor n - 1."""
        return self.scatter / (self.n - 1)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Frechet distance of two normal distributions (arXiv 1706.08500, eq. 6), in float64.

    The trace of the root of S1 S2 is taken from the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2), which stay real.

    Args:
        mean1, mean2: [D].
        covariance1, covariance2: [D, D].
    """
    mean1, covariance1, mean2, covariance2 = (t.double().cpu() for t in (mean1, covariance1, mean2, covariance2))
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ covariance2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * trace
    return distance.item()


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3 (arXiv 1801.01401) -> mean and deviation over subsets.

    Drawn as torch-fidelity draws: without replacement from one numpy stream, the fake rows of a subset first. It can be
    slightly negative.

    Args:
        real, fake: [N, D], [M, D].
        subset_size: at most the smaller set is taken.
    """
    size, stream = min(subset_size, len(real), len(fake)), np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        chosen_fake = torch.from_numpy(stream.choice(len(fake), size, replace=False))
        chosen_real = torch.from_numpy(stream.choice(len(real), size, replace=False))
        distances.append(squared_mmd(fake[chosen_fake], real[chosen_real]))
    return float(np.mean(distances)), float(np.std(distances))


def squared_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of rows [n, D] each, with the kernel of `kernel_distance`."""
    a, b = a.double(), b.double()
    within = 0.0
    for rows in (a, b):
        kernel = (rows @ rows.T / rows.shape[1] + 1) ** 3
        within += ((kernel.sum() - kernel.trace()) / (len(rows) * (len(rows) - 1))).item()
    return within - 2 * ((a @ b.T / a.shape[1] + 1) ** 3).mean().item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp of the mean divergence of p(class | picture) from p(class) (arXiv 1606.03498) -> mean and deviation over splits.

    The order of the rows matters as soon as there is more than one split: hand them over in `canonical_order`.

    Args:
        logits: [N, C] without the bias of the last layer, as every reference takes them.
    """
    log_p = logits.double().log_softmax(dim=1)
    scores = []
    for i in range(splits):
        part = log_p[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        marginal = part.exp().mean(dim=0, keepdim=True).log()
        scores.append((part.exp() * (part - marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def canonical_order(rows: Tensor, seed: int = 2020) -> Tensor:
    """A shuffled order [N] of rows [N, C] that does not depend on the order in which they came (equal rows aside)."""
    sorted_ = np.lexsort(rows.cpu().numpy().T[:16])
    return torch.from_numpy(sorted_[np.random.RandomState(seed).permutation(len(sorted_))])


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3, rows: int = 1024) -> tuple[float, float]:
    """Share of fakes inside the real manifold, and of reals inside the fake one (arXiv 1904.06991).

    A manifold is the union of balls, each up to its centre's k-th neighbour within the set. Distances are taken in blocks
    of `rows`, so that memory grows with N alone.

    Args:
        real, fake: [N, D], [M, D].
    """
    real, fake = real.float(), fake.float()
    real_radii, fake_radii = (_radii(features, neighbours, rows) for features in (real, fake))
    return _inside(fake, real, real_radii, rows), _inside(real, fake, fake_radii, rows)


def _radii(features: Tensor, neighbours: int, rows: int) -> Tensor:
    """Distance [N] to the k-th nearest other row."""
    parts = [torch.cdist(part, features).kthvalue(neighbours + 1).values for part in features.split(rows)]
    return torch.cat(parts)


def _inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    inside = [(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(rows)]
    return torch.cat(inside).double().mean().item()


def psnr(reconstructed: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures [B, 3, H, W] in [0, 1] -> [B]."""
    return -10 * (reconstructed.double() - real.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(reconstructed: Tensor, real: Tensor) -> Tensor:
    """Structural similarity of pictures [B, 3, H, W] in [0, 1] -> [B]: mean over 7 x 7 windows, as scikit-image has it.

    Paper: "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), with sample covariances.
    """
    a, b = reconstructed.double(), real.double()
    mean_a, mean_b, square_a, square_b, product = (F.avg_pool2d(x, 7, 1) for x in (a, b, a * a, b * b, a * b))
    sample = 49 / 48
    variance_a, variance_b = (sample * (s - m * m) for s, m in ((square_a, mean_a), (square_b, mean_b)))
    covariance = sample * (product - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean(dim=(1, 2, 3))
