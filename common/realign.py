"""GLA-FR: realignment of linear heads by the norms of their rows (FedLoGe, ICLR 2024, section 3.3).

Rows of a head trained on long-tailed data grow with the class's frequency, so argmax favours frequent classes.
Globally the norms are made equal; locally the norms a site's own head has learned are given to the global
directions. Biases are not touched. psi: global head, phi: personal head, both with rows psi_c, phi_c.
"""

import torch
from torch import Tensor, nn

TINY = 1e-12  # a row that is exactly zero has no direction and stays zero


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A head with the given rows; it does not train."""
    classes, dim = weight.shape
    head = nn.Linear(dim, classes, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    return head.requires_grad_(False)


def realigned(psi: nn.Linear, gain: float) -> nn.Linear:
    """psi'_c = gain * psi_c / |psi_c|: the generic head."""
    norms = psi.weight.norm(dim=1, keepdim=True).clamp_min(TINY)
    return linear(gain * psi.weight / norms, psi.bias)


def transferred(psi: nn.Linear, phi: nn.Linear) -> nn.Linear:
    """psi_{k,c} = psi_c * |phi_{k,c}|: the global head with the site's norms. psi is not normalised first."""
    return linear(psi.weight * phi.weight.norm(dim=1, keepdim=True), psi.bias)


def added(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """The head whose logits are the sum of both heads' logits."""
    return linear(first.weight + second.weight, first.bias + second.bias)


def averaged(first: nn.Linear, second: nn.Linear, share: float) -> nn.Linear:
    """The head whose logits are the mean of both heads' logits, the second's with that weight."""
    return linear(first.weight.lerp(second.weight, share), first.bias.lerp(second.bias, share))


def personal_heads(psi: nn.Linear, phi: nn.Linear) -> dict[str, nn.Linear]:
    """Both published personal rules: the authors' code adds psi_k to phi_k, their README adds it to psi."""
    psi_k = transferred(psi, phi)
    return {"phi+psi_k": added(phi, psi_k), "psi_k+psi": added(psi_k, psi)}


def masked(logits: Tensor, support: Tensor) -> Tensor:
    """Logits with the classes a site never trained on out of the running."""
    return logits.masked_fill(~support, -torch.inf)
