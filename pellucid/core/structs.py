"""The structs and signatures of csrc/include/pellucid.h, as ctypes sees them."""

from __future__ import annotations

from ctypes import (
    POINTER,
    Structure,
    c_char,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

MAX_IN, MAX_OUT, MAX_WEIGHTS = 6, 2, 6
NUM_FLOATS = 4  # of a pld_op


class CpuInfoStruct(Structure):
    """pld_cpu_info."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("physical_cores", c_int32),
        ("logical_cores", c_int32),
        ("has_avx2", c_int32),
        ("has_avx512", c_int32),
        ("has_avx512_bf16", c_int32),
        ("has_avx512_vnni", c_int32),
        ("best_isa", c_int32),
        ("model_name", c_char * 128),
    ]


class ContextParamsStruct(Structure):
    """pld_context_params."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("num_threads", c_int32),
        ("isa", c_int32),
        ("spin_us", c_int32),
        ("poison", c_int32),
    ]


class WeightStruct(Structure):
    """pld_weight."""

    _fields_ = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("dtype", c_int32),
        ("layout", c_int32),
    ]


class KVParamsStruct(Structure):
    """pld_kv_params."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_layers", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("n_blocks", c_int32),
        ("dtype", c_int32),
        ("layout", c_int32),
    ]


class BatchStruct(Structure):
    """pld_batch."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_tokens", c_int32),
        ("n_seqs", c_int32),
        ("n_logit_rows", c_int32),
        ("block_table_width", c_int32),
        ("token_ids", c_void_p),
        ("positions", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("block_tables", c_void_p),
        ("slot_mapping", c_void_p),
        ("logit_rows", c_void_p),
    ]


class OpCallStruct(Structure):
    """pld_op_call."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("op", c_void_p),
        ("op_size", c_size_t),
        ("rows", c_int64),
        ("in_", c_void_p * MAX_IN),
        ("in_stride", c_int64 * MAX_IN),
        ("out", c_void_p * MAX_OUT),
        ("out_stride", c_int64 * MAX_OUT),
        ("weights", c_void_p),
        ("weight_size", c_size_t),
        ("batch", c_void_p),
        ("kv", c_void_p),
    ]


class ProgramDescStruct(Structure):
    """pld_program_desc."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_ops", c_int32),
        ("n_forward_ops", c_int32),
        ("n_buffers", c_int32),
        ("n_weights", c_int32),
        ("ops", c_void_p),
        ("buffers", c_void_p),
        ("weights", c_void_p),
        ("hidden", c_int32),
        ("logits", c_int32),
        ("max_tokens", c_int32),
        ("max_logit_rows", c_int32),
        ("vocab_size", c_int32),
        ("reserved", c_int32),
        ("n_kept", c_int32),
        ("kept", c_void_p),
        ("n_inputs", c_int32),
        ("inputs", c_void_p),
        ("op_size", c_size_t),
        ("buffer_size", c_size_t),
        ("weight_size", c_size_t),
    ]


class SampleRowStruct(Structure):
    """pld_sample_row."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("repetition_penalty", c_float),
        ("n_seen", c_int32),
        ("seen_ids", c_void_p),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
        ("n_counted", c_int32),
        ("n_biases", c_int32),
        ("counted_ids", c_void_p),
        ("counts", c_void_p),
        ("bias_ids", c_void_p),
        ("biases", c_void_p),
        ("n_banned", c_int32),
        ("n_allowed", c_int32),
        ("banned_ids", c_void_p),
        ("allowed_ids", c_void_p),
        ("mask", c_void_p),
        ("n_stops", c_int32),
        ("min_tokens", c_int32),
        ("stop_ids", c_void_p),
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_double),
        ("min_p", c_float),
        ("choice", c_uint32),
        ("seed", c_uint64),
        ("position", c_uint64),
        ("wants_log_sum_exp", c_int64),
    ]


class SampleCallStruct(Structure):
    """pld_sample_call."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("logits", c_void_p),
        ("stride", c_int64),
        ("vocab_size", c_int32),
        ("n_rows", c_int32),
        ("rows", c_void_p),
        ("results", c_void_p),
        ("result_size", c_size_t),
    ]


class ModelParamsStruct(Structure):
    """pld_model_params."""

    _fields_ = [("struct_size", c_size_t), ("max_tokens", c_int32), ("max_logit_rows", c_int32)]


class ModelInfoStruct(Structure):
    """pld_model_info."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("vocab_size", c_int32),
        ("n_layers", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("max_positions", c_int32),
        ("kv_dtype", c_int32),
        ("n_end_tokens", c_int32),
        ("end_tokens", c_int32 * 16),
    ]


class VerifyParamsStruct(Structure):
    """pld_verify_params."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("bytes_per_second", c_int64),
        ("stop", c_void_p),
        ("idle", c_int32),
        ("reserved", c_int32),
    ]


class DecodeBatchStruct(Structure):
    """pld_decode_batch."""

    _fields_ = [
        ("struct_size", c_size_t),
        ("n_tokens", c_int32),
        ("block_table_width", c_int32),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("seq_ids", c_void_p),
        ("logits", c_void_p),
        ("slot_mapping", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("abort", c_void_p),
        ("more_start", c_void_p),
        ("more_seq_ids", c_void_p),
    ]


class KVStatsStruct(Structure):
    """pld_kv_stats."""

    _fields_ = [("struct_size", c_size_t), *((name, c_int64) for name in ("capacity", "used", "free", "peak"))]


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "pld_last_error": (c_char_p, []),
    "pld_last_error_item": (c_int32, [POINTER(c_int64)]),
    "pld_abi_version": (c_int32, []),
    "pld_recipe": (c_int32, []),
    "pld_cpu_info_get": (c_int32, [POINTER(CpuInfoStruct)]),
    "pld_context_params_init": (c_int32, [POINTER(ContextParamsStruct), c_size_t]),
    "pld_context_create": (c_int32, [POINTER(ContextParamsStruct), POINTER(c_void_p)]),
    "pld_context_destroy": (None, [c_void_p]),
    "pld_context_num_threads": (c_int32, [c_void_p]),
    "pld_context_isa": (c_int32, [c_void_p]),
    "pld_row_bytes": (c_int64, [c_int32, c_int64]),
    "pld_packed_bytes": (c_int64, [c_int64, c_int64, c_int32]),
    "pld_convert": (
        c_int32,
        [c_void_p, c_void_p, c_int64, c_int32, c_int64, c_int64, c_void_p, c_int64, c_int32],
    ),
    "pld_pack": (
        c_int32,
        [c_void_p, c_void_p, c_int64, c_int32, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int32],
    ),
    "pld_kv_params_init": (c_int32, [POINTER(KVParamsStruct), c_size_t]),
    "pld_kv_create": (c_int32, [POINTER(KVParamsStruct), POINTER(c_void_p)]),
    "pld_kv_destroy": (None, [c_void_p]),
    "pld_kv_bytes": (c_int64, [POINTER(KVParamsStruct)]),
    "pld_kv_read": (c_int32, [c_void_p, c_int32, c_int64, c_void_p, c_void_p]),
    "pld_sample_run": (c_int32, [c_void_p, POINTER(SampleCallStruct)]),
    "pld_sample": (c_int32, [c_void_p, c_void_p, c_int64, c_int32, c_void_p, c_int32, c_void_p]),
    "pld_model_params_init": (c_int32, [POINTER(ModelParamsStruct), c_size_t]),
    "pld_model_open": (c_int32, [c_void_p, c_char_p, POINTER(ModelParamsStruct), POINTER(c_void_p)]),
    "pld_model_close": (None, [c_void_p]),
    "pld_model_info_get": (c_int32, [c_void_p, POINTER(ModelInfoStruct)]),
    "pld_model_program": (c_void_p, [c_void_p]),
    "pld_verify_params_init": (c_int32, [POINTER(VerifyParamsStruct), c_size_t]),
    "pld_model_verify": (c_int32, [c_int32, POINTER(VerifyParamsStruct), POINTER(c_int64)]),
    "pld_decode": (c_int32, [c_void_p, c_void_p, POINTER(DecodeBatchStruct)]),
    "pld_logits_of": (c_void_p, [c_void_p, c_int32]),
    "pld_hidden_of": (c_void_p, [c_void_p, c_int32]),
    "pld_seq_cp": (c_int32, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "pld_seq_rm": (c_int32, [c_void_p, c_int32, c_int32, c_int32]),
    "pld_seq_add": (c_int32, [c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "pld_seq_keep": (c_int32, [c_void_p, c_int32]),
    "pld_seq_pos_max": (c_int32, [c_void_p, c_int32]),
    "pld_kv_free_cells": (c_int64, [c_void_p]),
    "pld_kv_stats_get": (c_int32, [c_void_p, POINTER(KVStatsStruct)]),
    "pld_kv_reset": (c_int32, [c_void_p]),
    "pld_request_free": (c_int32, [c_void_p, c_int32]),
    "pld_op_run": (c_int32, [c_void_p, POINTER(OpCallStruct)]),
    "pld_program_create": (c_int32, [c_void_p, POINTER(ProgramDescStruct), POINTER(c_void_p)]),
    "pld_program_destroy": (None, [c_void_p]),
    "pld_program_arena_bytes": (c_int64, [c_void_p]),
    "pld_program_run": (c_int32, [c_void_p, c_void_p, POINTER(BatchStruct)]),
    "pld_program_logits": (c_int32, [c_void_p, c_void_p, c_int32]),
    "pld_program_hidden": (c_void_p, [c_void_p]),
    "pld_program_logits_data": (c_void_p, [c_void_p]),
    "pld_program_kept": (c_void_p, [c_void_p, c_int32]),
    "pld_program_input": (c_void_p, [c_void_p, c_int32]),
}
