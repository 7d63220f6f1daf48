"""A `torch_npu` that exists nowhere, for `ops/test_ascend.py`: Ascend's fused operators on the stand-in device.

Signatures, layouts and limits are those of Ascend's documentation (op-plugin, docs/zh/custom_APIs/torch_npu), and of
the two backward operators those of its list of schemas (op_plugin/config/op_plugin_functions.yaml). Each is computed
from the documented formula; a call against the documentation fails.
"""

import functools
import importlib.machinery
import sys
import types

import torch
from torch.utils._pytree import tree_map

import stand_in_device

CALLS: list[str] = []
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
REPEATS = 8  # the last dimension of a softmax's maxima and sums


def vendor(function):
    """An operator of the device: all of its tensors must lie there."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = stand_in_device.tensors((args, kwargs))
        strange = [x.shape for x in given if not isinstance(x, stand_in_device.StandIn)]
        assert not strange, f"{function.__name__}: tensors {strange} are not of the device"
        CALLS.append(function.__name__)
        found = function(*tree_map(stand_in_device.unwrap, args), **tree_map(stand_in_device.unwrap, kwargs))
        return tree_map(lambda x: stand_in_device.StandIn(x) if isinstance(x, torch.Tensor) else x, found)

    return call


def rows_scaled(x, gamma, epsilon):
    assert gamma.shape == x.shape[x.dim() - gamma.dim() :]
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * scale * gamma.float()).to(x.dtype), scale


@vendor
def npu_rms_norm(self, gamma, epsilon=1e-06):
    assert self.dtype in FLOATS and gamma.dtype in (self.dtype, torch.float32) and 2 <= self.dim() <= 8
    return rows_scaled(self, gamma, epsilon)


@vendor
def npu_rms_norm_backward(dy, self, gamma, rstd):
    assert rstd.dtype is torch.float32 and rstd.shape == (*self.shape[:-1], 1)
    x, upper = self.float() * rstd, dy.float()
    inner = upper * gamma.float()
    grad = rstd * (inner - x * (inner * x).mean(-1, keepdim=True))
    return grad.to(self.dtype), (upper * x).flatten(0, -2).sum(0)


@vendor
def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-06):
    assert x1.numel() and x1.dtype is x2.dtype is gamma.dtype and x1.shape == x2.shape, "no empty tensors"
    total = x1 + x2
    return *rows_scaled(total, gamma, epsilon), total


@vendor
def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    tokens, heads, dim = input.shape
    assert rotary_mode == "half" and rotate is None and dim < 896 and dim % 2 == 0 and heads < 1000
    for r in (r1, r2):
        assert r.shape in ((tokens, 1, dim), input.shape) and r.dtype is input.dtype and r.abs().max() <= 1
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), -1) * r2


def attention_parts(query, key, value, head_num, input_layout, atten_mask, pre, following, mode, ends, key_ends, sink):
    """Yield each document's slice of rows, its keys repeated for the queries' heads, and which pairs are seen."""
    assert input_layout == "TND" and query.shape[1] == head_num <= 256 and ends == key_ends and len(ends) <= 1024
    assert key.shape == value.shape and query.dtype is key.dtype is value.dtype and query.dtype in FLOATS
    assert head_num % key.shape[1] == 0 and query.shape[2] == key.shape[2] <= 768
    assert all(x.is_contiguous() for x in (query, key, value)) and all(type(end) is int for end in ends)
    assert ends == sorted(ends) and ends[-1] == len(query) and mode in (3, 4)
    assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool()), "the compressed triangle"
    assert sink is None or (sink.dtype is torch.float32 and sink.shape == (head_num,))
    for start, end in zip([0, *ends], ends, strict=False):
        place = torch.arange(end - start)
        behind = place[:, None] - place
        seen = (behind >= 0) if mode == 3 else (behind <= pre) & (-behind <= following)
        k, v = (x[start:end].float().repeat_interleave(head_num // key.shape[1], 1) for x in (key, value))
        yield slice(start, end), k, v, seen


@vendor
def npu_fusion_attention(
    query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None, scale=1.0, keep_prob=1.0,
    pre_tockens=2147483647, next_tockens=2147483647, inner_precise=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
    dropout_mask=None, seed=0, offset=0,
):  # fmt: skip
    shared = (atten_mask, pre_tockens, next_tockens, sparse_mode, actual_seq_qlen, actual_seq_kvlen, sink)
    assert softmax_layout == "TND"
    out, (maxima, sums) = query.new_empty(query.shape), torch.empty(2, *query.shape[:2])
    for rows, k, v, seen in attention_parts(query, key, value, head_num, input_layout, *shared):
        scores = torch.einsum("qhd,khd->qhk", query[rows].float(), k) * scale
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        maxima[rows] = scores.amax(-1) if sink is None else torch.maximum(scores.amax(-1), sink)
        weights = (scores - maxima[rows][..., None]).exp()
        sums[rows] = weights.sum(-1) + (0 if sink is None else (sink - maxima[rows]).exp())
        out[rows] = torch.einsum("qhk,khd->qhd", weights / sums[rows][..., None], v).to(out.dtype)
    repeated = [x[..., None].expand(-1, -1, REPEATS).contiguous() for x in (maxima, sums)]
    return out, *repeated, torch.empty(0), 0, 0, 0


@vendor
def npu_fusion_attention_grad(
    query, key, value, dy, head_num, input_layout, *, pse=None, padding_mask=None, atten_mask=None, softmax_max=None,
    softmax_sum=None, softmax_in=None, attention_in=None, scale_value=1.0, keep_prob=1.0, pre_tockens=2147483647,
    next_tockens=2147483647, inner_precise=0, seed=0, offset=0, numels=0, prefix=None, actual_seq_qlen=None,
    actual_seq_kvlen=None, sparse_mode=0, gen_mask_parallel=True, sync=False, softmax_layout="", sink=None,
):  # fmt: skip
    shared = (atten_mask, pre_tockens, next_tockens, sparse_mode, actual_seq_qlen, actual_seq_kvlen, sink)
    assert softmax_layout == "TND" and dy.shape == attention_in.shape == query.shape and dy.is_contiguous()
    for x in (softmax_max, softmax_sum):
        assert x.dtype is torch.float32 and x.shape == (*query.shape[:2], REPEATS) and x.is_contiguous()
    grads = [torch.zeros(x.shape) for x in (query, key, value)]
    delta = (dy.float() * attention_in.float()).sum(-1)
    groups = (key.shape[1], -1)
    for rows, k, v, seen in attention_parts(query, key, value, head_num, input_layout, *shared):
        scores = torch.einsum("qhd,khd->qhk", query[rows].float(), k) * scale_value
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        weights = (scores - softmax_max[rows, :, :1]).exp() / softmax_sum[rows, :, :1]
        upper = torch.einsum("qhd,khd->qhk", dy[rows].float(), v)
        slope = weights * (upper - delta[rows][..., None]) * scale_value
        grads[0][rows] = torch.einsum("qhk,khd->qhd", slope, k)
        grads[1][rows] = torch.einsum("qhk,qhd->khd", slope, query[rows].float()).unflatten(1, groups).sum(2)
        grads[2][rows] = torch.einsum("qhk,qhd->khd", weights, dy[rows].float()).unflatten(1, groups).sum(2)
    of_sink = torch.empty(0)
    if sink is not None:
        of_sink = -((sink - softmax_max[..., 0]).exp() / softmax_sum[..., 0] * delta).sum(0)
    return *(grad.to(query.dtype) for grad in grads), torch.empty(0), of_sink


@vendor
def npu_grouped_matmul(
    x, weight, *, bias=None, scale=None, offset=None, antiquant_scale=None, antiquant_offset=None,
    per_token_scale=None, group_list=None, activation_input=None, activation_quant_scale=None,
    activation_quant_offset=None, split_item=0, group_type=None, group_list_type=0, act_type=0, output_dtype=None,
    tuning_config=None,
):  # fmt: skip
    (left,), (right,) = x, weight
    assert bias is None and split_item in (2, 3) and group_list_type == 0 and left.dtype is right.dtype
    assert group_list.dtype is torch.int64 and group_list.dim() == 1 and len(group_list) <= 1024
    ends = group_list.tolist()
    pairs = list(zip([0, *ends], ends, strict=False))
    if group_type == 0:
        assert right.dim() == 3 and left.is_contiguous() and ends[-1] == len(left) and len(ends) == len(right)
        parts = [left[a:b].float() @ w.float() for (a, b), w in zip(pairs, right, strict=True)]
        return [torch.cat(parts).to(left.dtype)]
    assert group_type == 2 and right.dim() == 2 and left.t().is_contiguous() and ends[-1] == left.shape[1] == len(right)
    return [torch.stack([left[:, a:b].float() @ right[a:b].float() for a, b in pairs]).to(left.dtype)]


@vendor
def npu_moe_gating_top_k(
    x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=0, renorm=0,
    norm_type=0, out_flag=False, routed_scaling_factor=1.0, eps=1e-20,
):  # fmt: skip
    rows, experts = x.shape
    size = experts // group_count
    assert renorm == 0 and experts <= 2048 and size > 2 and -(-size // 32) * 32 * group_count <= 2048
    assert 1 <= k <= size * k_group and 1 <= k_group <= group_count and (bias is None or bias.dtype is x.dtype)
    normed = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    values = normed if bias is None else normed + bias
    if group_count > 1:
        grouped = values.view(rows, group_count, size)
        good = grouped.topk(2, -1).values.sum(-1) if group_select_mode == 1 else grouped.amax(-1)
        best = good.argsort(stable=True, dim=-1, descending=True)[:, :k_group]
        hidden = torch.ones(rows, group_count, dtype=torch.bool).scatter(1, best, False)
        values = grouped.masked_fill(hidden[..., None], -torch.inf).view(rows, experts)
    chosen = values.argsort(stable=True, dim=-1, descending=True)[:, :k]
    weights = normed.gather(1, chosen)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), chosen.int(), torch.empty(0)


@vendor
def npu_moe_init_routing_v2(
    x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1, drop_pad_mode=0,
    expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1, active_expert_range=(), row_idx_type=0,
):  # fmt: skip
    assert expert_idx.dtype is torch.int32 and drop_pad_mode == 0 and quant_mode == -1 and row_idx_type == 1
    assert expert_tokens_num_flag and expert_tokens_num_type == 1 and list(active_expert_range) == [0, expert_num]
    assert active_num in (-1, 0, expert_idx.numel()) and int(expert_idx.max()) < expert_num <= 10240
    order = expert_idx.flatten().argsort(stable=True)
    counts = expert_idx.flatten().bincount(minlength=expert_num)
    return x[order // expert_idx.shape[1]], order.int(), counts, torch.empty(expert_idx.numel())


@vendor
def npu_moe_finalize_routing(
    expanded_permuted_rows, skip1, skip2, bias, scales, expanded_src_to_dst_row, expert_for_source_row,
    drop_pad_mode=0,
):  # fmt: skip
    assert skip1 is None and skip2 is None and bias is None and expert_for_source_row is None and drop_pad_mode == 2
    assert expanded_src_to_dst_row.dtype is torch.int32 and scales.dtype is expanded_permuted_rows.dtype
    rows = expanded_permuted_rows[expanded_src_to_dst_row.long()].unflatten(0, scales.shape).float()
    return (rows * scales[..., None].float()).sum(1).to(scales.dtype)


@vendor
def npu_weight_quant_batchmatmul(
    x, weight, antiquant_scale, antiquant_offset=None, quant_scale=None, quant_offset=None, bias=None,
    antiquant_group_size=0, inner_precise=0,
):  # fmt: skip
    depth, out = weight.shape
    assert x.dtype in HALVES and antiquant_scale.dtype is x.dtype and weight.dtype is torch.int8 and x.numel()
    assert antiquant_offset is None and quant_scale is None and quant_offset is None
    assert bias is None or (bias.dtype is (torch.float32 if x.dtype is torch.bfloat16 else x.dtype))
    if antiquant_group_size:
        assert 32 <= antiquant_group_size <= depth - 1 and antiquant_group_size % 32 == 0
        assert antiquant_scale.shape == (-(-depth // antiquant_group_size), out)
        antiquant_scale = antiquant_scale.repeat_interleave(antiquant_group_size, 0)[:depth]
    else:
        assert antiquant_scale.shape in ((1, out), (out,))
    product = x.float() @ (weight.float() * antiquant_scale.float())
    return (product if bias is None else product + bias.float()).to(x.dtype)


def install():
    """Let `import torch_npu` find this; return the module."""
    module = types.ModuleType("torch_npu")
    module.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
    for name, value in globals().items():
        if name.startswith("npu_"):
            setattr(module, name, value)
    sys.modules["torch_npu"] = module
    return module
