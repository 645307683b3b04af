"""Language models of transformers."""

from __future__ import annotations

from typing import Any

from tests.zoo.cases import case
from tests.zoo.hugging import WORDS, alone, both, causal, classified, made, masked, translated, unmasked

SMALL: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
OPENAI: dict[str, Any] = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": WORDS,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

both("gpt2", "GPT2LMHeadModel", "GPT2Config", causal, **OPENAI)
alone("gpt2 train, dropout", "GPT2LMHeadModel", "GPT2Config", causal, train=True, **OPENAI)
both("llama", "LlamaForCausalLM", "LlamaConfig", causal, **GROUPED)
both("qwen2", "Qwen2ForCausalLM", "Qwen2Config", causal, **GROUPED)
both("qwen3", "Qwen3ForCausalLM", "Qwen3Config", causal, **GROUPED)
both("mistral", "MistralForCausalLM", "MistralConfig", causal, sliding_window=3, **GROUPED)
both(
    "mixtral", "MixtralForCausalLM", "MixtralConfig", unmasked,
    num_local_experts=3, experts_implementation="eager", output_router_logits=True, **GROUPED,
)  # fmt: skip
both("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", causal, **SMALL)
both("opt", "OPTForCausalLM", "OPTConfig", causal, ffn_dim=24, word_embed_proj_dim=16, **SMALL)
alone(
    "bloom", "BloomForCausalLM", "BloomConfig", causal,
    vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
both("falcon", "FalconForCausalLM", "FalconConfig", causal, **SMALL)
both("gemma", "GemmaForCausalLM", "GemmaConfig", causal, **GROUPED)
alone("gemma2 eager", "Gemma2ForCausalLM", "Gemma2Config", causal, attn_implementation="eager", **GROUPED)
both("phi", "PhiForCausalLM", "PhiConfig", causal, **SMALL)
alone("phi3", "Phi3ForCausalLM", "Phi3Config", causal, **SMALL)
alone("olmo2", "Olmo2ForCausalLM", "Olmo2Config", causal, **GROUPED)
alone("gpt-j", "GPTJForCausalLM", "GPTJConfig", causal, rotary_dim=4, **OPENAI)
alone("gpt-neo", "GPTNeoForCausalLM", "GPTNeoConfig", causal, num_layers=2, num_heads=2,
      attention_types=[[["global", "local"], 1]], window_size=3,
      **{k: v for k, v in SMALL.items() if k not in ("num_hidden_layers", "num_attention_heads")})  # fmt: skip
alone(
    "mamba", "MambaForCausalLM", "MambaConfig", unmasked,
    vocab_size=WORDS, hidden_size=12, state_size=4, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
alone(
    "mamba2", "Mamba2ForCausalLM", "Mamba2Config", unmasked,
    vocab_size=WORDS, hidden_size=12, state_size=4, num_hidden_layers=2, num_heads=3, head_dim=8, n_groups=1,
    chunk_size=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
alone(
    "xlnet", "XLNetForSequenceClassification", "XLNetConfig", classified,
    vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
alone(
    "rwkv", "RwkvForCausalLM", "RwkvConfig", unmasked,
    vocab_size=WORDS, hidden_size=16, attention_hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    use_cache=False, rescale_every=0,
)  # fmt: skip
alone(
    "recurrent-gemma", "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", unmasked,
    lru_width=16, attention_window_size=4, use_cache=False, block_types=("recurrent", "attention"), **GROUPED,
)  # fmt: skip
alone(
    "deepseek-v3", "DeepseekV3ForCausalLM", "DeepseekV3Config", unmasked,
    moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    num_key_value_heads=2, experts_implementation="eager", **SMALL,
)  # fmt: skip

both("bert", "BertForMaskedLM", "BertConfig", masked, **SMALL)
alone("bert train, dropout", "BertForMaskedLM", "BertConfig", masked, train=True, **SMALL)
both("roberta", "RobertaForMaskedLM", "RobertaConfig", masked, **SMALL)
both(
    "distilbert", "DistilBertForMaskedLM", "DistilBertConfig", masked,
    vocab_size=WORDS, dim=16, hidden_dim=24, n_layers=2, n_heads=2, max_position_embeddings=32, pad_token_id=0,
)  # fmt: skip
both("albert", "AlbertForMaskedLM", "AlbertConfig", masked, embedding_size=8, **SMALL)
both("electra", "ElectraForMaskedLM", "ElectraConfig", masked, embedding_size=8, **SMALL)
alone(
    "deberta", "DebertaForMaskedLM", "DebertaConfig", masked, relative_attention=True, pos_att_type="c2p|p2c", **SMALL
)
alone("deberta-v2", "DebertaV2ForMaskedLM", "DebertaV2Config", masked,
      relative_attention=True, pos_att_type="c2p|p2c", **SMALL)  # fmt: skip
alone("mpnet", "MPNetForMaskedLM", "MPNetConfig", masked, **SMALL)
alone("longformer", "LongformerForMaskedLM", "LongformerConfig", masked, attention_window=4, **SMALL)
alone("fnet", "FNetForMaskedLM", "FNetConfig", unmasked, **SMALL)
alone("modernbert", "ModernBertForMaskedLM", "ModernBertConfig", masked, attn_implementation="sdpa",
      cls_token_id=1, sep_token_id=2, **SMALL)  # fmt: skip
alone("roformer", "RoFormerForMaskedLM", "RoFormerConfig", masked, embedding_size=8, **SMALL)

T5: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
both("t5", "T5ForConditionalGeneration", "T5Config", translated, **T5)
alone("t5 gated", "T5ForConditionalGeneration", "T5Config", translated, feed_forward_proj="gated-gelu", **T5)
both("bart", "BartForConditionalGeneration", "BartConfig", translated, **BART)
alone("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", translated, **BART)


def checkpointed(use_reentrant: bool) -> Any:
    """Training with the memory saver of the package switched on."""

    def make() -> Any:
        model, loss_fn, batch = plain()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model.train(), loss_fn, batch

    return make


plain = made("LlamaForCausalLM", "LlamaConfig", causal, True, use_cache=False, **GROUPED)
case("llama checkpointed", checkpointed(False), needs=("transformers",), truth=plain)
case("llama checkpointed, reentrant", checkpointed(True), needs=("transformers",), truth=plain)
