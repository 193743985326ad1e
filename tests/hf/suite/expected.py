"""The tests of transformers that fail on our model or our attention, each with its reason."""

ALL = ("TestSwat", "TestSwatMixed", "TestMistral", "TestLlama", "TestQwen3")
OURS, THEIRS = ALL[:2], ALL[2:]

# (classes, names of tests, reason)
EXPECTED = [
    (
        THEIRS,
        [
            "test_capture_outputs_decorator",
            "test_model_outputs_equivalence",
            "test_retain_grad_hidden_states_attentions",
        ],
        "asks for attention weights, which never exist",
    ),
    (
        THEIRS,
        ["test_sdpa_can_dispatch_non_composite_models"],
        "expects a saved model to come back with a softmax; it comes back with the attention that it was saved with",
    ),
    (
        ["TestLlama"],
        ["test_custom_4d_attention_mask"],
        "its mask is a tree, texts that share a beginning and not their ends, which document ids do not express",
    ),
    (
        OURS,
        [
            "test_assisted_decoding_matches_greedy_search_0_random",
            "test_assisted_decoding_matches_greedy_search_1_same",
            "test_beam_search_generate_dict_outputs_use_cache",
            "test_generate_compile_model_forward_fullgraph",
            "test_greedy_generate_dict_outputs_use_cache",
            "test_past_key_values_format",
        ],
        "expects a DynamicCache, as long as the text; generate keeps rings of a window's slots",
    ),
    (
        ["TestSwatMixed"],
        [
            "test_assisted_decoding_sample",
            "test_generate_compilation_all_outputs",
            "test_generate_from_inputs_embeds_with_static_cache",
            "test_generate_with_static_cache",
        ],
        "expects the shape of a cache that keeps every token; one layer keeps 3",
    ),
]


def expected():
    """{"Class.test": reason}."""
    return {f"{kind}.{name}": reason for kinds, names, reason in EXPECTED for kind in kinds for name in names}
