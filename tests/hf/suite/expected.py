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
        ["test_generate_compile_model_forward_fullgraph"],
        "expects generate to keep keys in a DynamicCache; ours is a SwatCache",
    ),
    (
        ["TestSwatMixed"],
        [
            "test_generate_from_inputs_embeds_with_static_cache",
            "test_generate_with_static_cache",
            "test_past_key_values_format",
        ],
        "expects a cache to keep every token; a layer keeps its window",
    ),
]


def expected():
    """{"Class.test": reason}."""
    return {f"{kind}.{name}": reason for kinds, names, reason in EXPECTED for kind in kinds for name in names}
