r"""The mathematics of perturbed layers: pure functions of tensors.

Notation: N rows, I inputs, O outputs; ``w``, ``b`` mean weight and bias; ``dw``, ``db`` base perturbation (sigma applied);
``s``, ``r`` row factors over inputs and outputs; ``c`` noise scale. Row n sees the weights

.. math:: W_n = \bar W + c_n \, \Delta W \circ r_n s_n^\top, \qquad b_n = \bar b + c_n \, \Delta b \circ r_n

(Wen et al. 2018, eq. (3)). An ``op`` is what a layer does with weights: ``op(x, w, b)``, linear in ``w`` and ``b``. All
formulas are compositions of differentiable operations, so they can be differentiated twice, as TRPO needs.
"""

from collections.abc import Callable, Sequence

import torch as th

from sb3_flipout.noise.compiling import recording

Op = Callable[[th.Tensor, th.Tensor, th.Tensor | None], th.Tensor]


def delta(mean: th.Tensor, sigma: th.Tensor | None, base: th.Tensor | None, relative: bool) -> th.Tensor:
    """
    Compute a base perturbation: the product of those of sigma, base draw and mean weights that the family has.

    :param mean: Mean weights, shape (O, I, ...), or mean bias, shape (O,)
    :param sigma: Sigma, shape of ``mean`` or (); ``None`` where the family has none
    :param base: Base draw, shape of ``mean`` (with leading rows, where each row has its own); ``None`` where there is none
    :param relative: Whether the perturbation is relative to the mean weights
    :return: Perturbation before row factors and noise scale, shape of the largest part
    """
    product = sigma if base is None else base if sigma is None else sigma * base
    if product is None:
        raise ValueError("a perturbation needs sigma or a base draw, got neither")
    product = product * mean if relative else product
    return product if product.shape[-mean.dim() :] == mean.shape else product.expand_as(mean)


def each_its_own(of_inputs: th.Tensor) -> th.Tensor:
    """
    Say that there is a row for each input.

    :param of_inputs: Something of each input
    :return: The same, of each row
    """
    return of_inputs


def _added(of_mean: th.Tensor, noise: th.Tensor, r: th.Tensor) -> th.Tensor:
    """Add the noise; without gradients in place, since ``of_mean`` is nobody's, and new memory is slow where it is large."""
    if th.is_grad_enabled() or recording():
        return th.addcmul(of_mean, noise, r)
    return of_mean.addcmul_(noise, r)


def flipout(
    op: Op,
    x: th.Tensor,  # shape: (N, I, ...) or (N, ..., I)
    mean: tuple[th.Tensor, th.Tensor | None] | None,
    deltas: tuple[th.Tensor, th.Tensor | None],
    s: th.Tensor,  # broadcasts against x
    r: th.Tensor,  # broadcasts against the output; already multiplied by c
    for_rows: Callable[[th.Tensor], th.Tensor] = each_its_own,
) -> th.Tensor:
    """
    Perturb every row by its own pseudo-independent weights: Wen et al. 2018, eq. (4).

    Right for every ``op`` in which the factors of a weight element's input and output are constant: a matrix product,
    and a convolution with one factor per channel, since ``op(x, dw * r s^T) = r * op(s * x, dw)``. Where several rows
    have the same input, ``op`` with the mean weights is computed once for them.

    :param op: What the layer does with weights
    :param x: Inputs
    :param mean: Mean weight and bias; ``None`` where they are 0
    :param deltas: Base perturbation of weight and bias
    :param s: Row factors over inputs
    :param r: Row factors over outputs, multiplied by the noise scale
    :param for_rows: Repeats what there is of each input for the rows that have it; by default there is one
    :return: ``op`` with each row's own weights
    """
    of_mean = None if mean is None else for_rows(op(x, *mean))
    flipped = for_rows(x) * s
    # Types differ under autocast only; asking costs less than a cast that changes nothing.
    noise = op(flipped if flipped.dtype == x.dtype else flipped.to(x.dtype), *deltas)
    r = r if r.dtype == noise.dtype else r.to(noise.dtype)
    return noise * r if of_mean is None else _added(of_mean, noise, r)


def rank_one(
    op: Op,
    summed: Callable[[th.Tensor], th.Tensor],
    x: th.Tensor,  # shape: (N, I, ...) or (N, ..., I)
    mean: tuple[th.Tensor, th.Tensor | None],
    sigma: th.Tensor,  # shape: ()
    s: th.Tensor,  # broadcasts against x
    r: th.Tensor,  # broadcasts against the output; already multiplied by c
    for_rows: Callable[[th.Tensor], th.Tensor] = each_its_own,
) -> th.Tensor:
    """
    Perturb every row by sigma times the outer product of its factors (Sarkar et al. 2025): ``y + r * sigma * (s . x + 1)``.

    :param op: What the layer does with weights
    :param summed: ``op`` with weights of 1, for one output of each group, seen by all of its outputs
    :param x: Inputs
    :param mean: Mean weight and bias
    :param sigma: Sigma of the layer
    :param s: Row factors over inputs
    :param r: Row factors over outputs, multiplied by the noise scale
    :param for_rows: Repeats what there is of each input for the rows that have it; by default there is one
    :return: ``op`` with each row's own weights
    """
    of_mean = for_rows(op(x, *mean))
    noise = _summed_products(for_rows(x), s, summed)
    noise = (sigma * (noise if mean[1] is None else noise + 1)).to(of_mean.dtype)
    return _added(of_mean, noise, r.to(noise.dtype))


# Numbers of a product that stay in a core's cache. Beyond it, what is summed up at once need not be written to memory.
_BLOCK = 1 << 18


def _summed_products(x: th.Tensor, s: th.Tensor, summed: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
    rows = max(1, _BLOCK * len(x) // max(1, x.numel()))
    # Where rows lie in another dimension than the first, factors have fewer dimensions than inputs, whatever their sizes.
    if len(x) <= rows or s.dim() != x.dim() or len(s) != len(x) or recording():
        return summed((x * s).to(x.dtype))
    return th.cat([summed((x[n : n + rows] * s[n : n + rows]).to(x.dtype)) for n in range(0, len(x), rows)])


def shared(
    op: Op,
    x: th.Tensor,  # shape: (N, ...)
    mean: tuple[th.Tensor, th.Tensor | None],
    deltas: tuple[th.Tensor, th.Tensor | None],
    c: th.Tensor,  # broadcasts against the output
) -> th.Tensor:
    """
    Perturb all rows by the same draw, as NoisyNet does (Fortunato et al. 2018), each at its own scale.

    :param op: What the layer does with weights
    :param x: Inputs
    :param mean: Mean weight and bias
    :param deltas: Perturbation of weight and bias
    :param c: Noise scale of each row
    :return: ``op`` with the batch's weights
    """
    noise = op(x, *deltas)
    return th.addcmul(op(x, *mean), noise, c.to(noise.dtype))


def linear_per_row(
    x: th.Tensor,  # shape: (N, ..., I)
    w: th.Tensor,  # shape: (N, O, I)
    b: th.Tensor | None,  # shape: (N, O)
) -> th.Tensor:
    """
    Apply to each row its own weight matrix: the batched matrix product that flipout avoids.

    :param x: Inputs
    :param w: Weights, one matrix per row
    :param b: Biases, one vector per row
    :return: Outputs, shape (N, ..., O)
    """
    rows = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # (N, M, I)
    w = w.transpose(1, 2)
    y = th.bmm(rows, w) if b is None else th.baddbmm(b[:, None], rows, w)
    return y.view(*x.shape[:-1], w.shape[2])


def conv_per_row(
    conv: Op,
    x: th.Tensor,  # shape: (N, C, ...)
    w: th.Tensor,  # shape: (N, *kernel)
    b: th.Tensor | None,  # shape: (N, O)
) -> th.Tensor:
    """
    Apply to each row its own kernel, row after row.

    :param conv: The convolution, plain or transposed, with its stride, padding, dilation and groups
    :param x: Inputs
    :param w: Kernels, one per row
    :param b: Biases, one vector per row
    :return: Outputs, shape (N, O, ...)
    """
    if not len(x):  # any kernel gives the shape
        return conv(x, w.sum(0), None if b is None else b.sum(0))
    return th.cat([conv(x[n : n + 1], w[n], None if b is None else b[n]) for n in range(len(x))])


def fan_in(weight: th.Tensor) -> int:
    """
    Count the inputs that one output adds up.

    :param weight: Weight of a linear or convolutional layer, shape (O, I, ...)
    :return: I times the size of the kernel
    """
    return weight[0].numel()


def gru(
    gates: Sequence[th.Tensor],
    state: th.Tensor,
    step: Callable[[th.Tensor, int], th.Tensor],
) -> tuple[list[th.Tensor], th.Tensor]:
    """
    Run one GRU layer over time (Cho et al. 2014, with the reset gate behind the matrix: ``nn.GRU``'s equations and order).

    :param gates: For each step what the inputs give the gates, shape (N_t, 3 * hidden); N_t may fall, then the last rows end
    :param state: Hidden state before the first step, shape (N_0, hidden)
    :param step: What the hidden state gives the gates of a step: called with hidden state and number of the step
    :return: Hidden states after each step, and the last states of all rows
    """
    h, outputs, ended = state, [], []
    for t, gates_t in enumerate(gates):
        n = len(gates_t)
        if n < len(h):
            ended.append(h[n:])
            h = h[:n]
        h = gru_step(gates_t, step(h, t), h)
        outputs.append(h)
    return outputs, th.cat([h, *reversed(ended)]) if ended else h


def gru_step(from_input: th.Tensor, from_hidden: th.Tensor, h: th.Tensor) -> th.Tensor:
    """
    Make one step of a GRU.

    :param from_input: What the inputs give the gates, shape (N, 3 * hidden)
    :param from_hidden: What the hidden state gives them, shape (N, 3 * hidden)
    :param h: Hidden state, shape (N, hidden)
    :return: Hidden state after the step
    """
    (input_r, input_z, input_n), (hidden_r, hidden_z, hidden_n) = from_input.chunk(3, dim=1), from_hidden.chunk(3, dim=1)
    reset = (input_r + hidden_r).sigmoid()
    update = (input_z + hidden_z).sigmoid()
    new = th.addcmul(input_n, reset, hidden_n).tanh()
    return th.lerp(new.to(h.dtype), h, update.to(h.dtype))  # under autocast the gates are of another type


def lstm(
    gates: Sequence[th.Tensor],
    state: tuple[th.Tensor, th.Tensor],
    step: Callable[[th.Tensor, th.Tensor, int], th.Tensor],
    kept: Sequence[th.Tensor] | None = None,
) -> tuple[list[th.Tensor], tuple[th.Tensor, th.Tensor]]:
    """
    Run one LSTM layer over time (Hochreiter & Schmidhuber 1997, with forget gate; ``nn.LSTM``'s equations and order of gates).

    :param gates: For each step what the inputs give the gates, shape (N_t, 4 * hidden); N_t may fall, then the last rows end
    :param state: Hidden and cell state before the first step, shape (N_0, hidden)
    :param step: Adds to the gates of a step what its hidden state gives them: called with gates, hidden state, and number of
        the step
    :param kept: For each step what the state is multiplied by before it: 0 where an episode starts; ``None`` for nothing
    :return: Hidden states after each step, and the last states of all rows
    """
    (h, c), outputs, ended = state, [], []
    for t, gates_t in enumerate(gates):
        n = len(gates_t)
        if n < len(h):
            ended.append((h[n:], c[n:]))
            h, c = h[:n], c[:n]
        if kept is not None:
            h, c = h * kept[t], c * kept[t]
        i, f, g, o = step(gates_t, h, t).chunk(4, dim=1)
        c = th.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    if not ended:
        return outputs, (h, c)
    last = [(h, c), *reversed(ended)]
    return outputs, (th.cat([h for h, _ in last]), th.cat([c for _, c in last]))
