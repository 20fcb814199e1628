"""A small folder in GLM-OCR's form, written by transformers, tokenizers and safetensors alone, so
that the tests of reading such folders do not depend on what our own code writes."""
import json
import random
from pathlib import Path

from tokenizer import CORPUS

# How GLM-OCR's tokenizer.json splits a text [R].
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Special tokens in GLM-OCR's order [R]; it has more of them, but no box marks are needed here.
SPECIAL = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>",
           "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>",
           "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<think>", "</think>",
           "<tool_call>", "</tool_call>", "/nothink", "<|image|>", "<|video|>"]
# What GLM-OCR's template does with texts and pictures, in a few lines [R].
TEMPLATE = """[gMASK]<sop>
{%- for m in messages -%}
<|{{ m.role if m.role != 'tool' else 'observation' }}|>
{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content -%}
{{ '<|begin_of_image|><|image|><|end_of_image|>' if part.type == 'image' else part.text }}
{%- endfor %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{{ '<think></think>\\n' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif %}"""


def trained_tokenizer(n_tokens: int = 700):
    """A byte-level BPE of the `tokenizers` package, trained on our corpus and on runs of equal
    characters, where merges and ranks can disagree."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, Regex, Tokenizer, trainers
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    runs = ["".join(rng.choice(("a", "aa", "-", "=", "aaa", " ", "红")) * rng.randrange(1, 9)
                    for _ in range(20)) for _ in range(300)]
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens, show_progress=False, special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = CORPUS.read_text(encoding="utf-8")[:100_000]
    made.train_from_iterator([*text.splitlines(), *runs], trainer)
    made.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    return made


def write_folder(folder: Path, seed: int = 0, mtp: bool = True, shard: str = "200KB"):
    """Write the folder of a model with random weights. mtp: with the MTP layer, with matrices of
    its own, in a shard of its own; transformers' class lacks that layer."""
    import torch
    from safetensors.torch import save_file
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration, PreTrainedTokenizerFast
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
    made = trained_tokenizer()
    id_of = made.token_to_id
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>",
                                        pad_token="<|endoftext|>", padding_side="left")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    # At most 64 visual tokens of 2 frames x 28 x 28 pixels.
    Glm46VImageProcessorPil(size={"shortest_edge": 4 * 1568, "longest_edge": 64 * 1568}
                            ).save_pretrained(folder)
    stops = [id_of("<|endoftext|>"), id_of("<|user|>")]
    width, rope = 64, {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0,
                       "mrope_section": [2, 3, 3]}
    config = GlmOcrConfig(
        text_config=dict(
            vocab_size=768, hidden_size=width, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
            max_position_embeddings=4096, rope_parameters=rope, num_nextn_predict_layers=1,
            pad_token_id=stops[0], eos_token_id=stops),
        vision_config=dict(depth=2, hidden_size=48, num_heads=3, intermediate_size=64,
                           out_hidden_size=width),
        image_token_id=id_of("<|image|>"), video_token_id=id_of("<|video|>"),
        image_start_token_id=id_of("<|begin_of_image|>"),
        image_end_token_id=id_of("<|end_of_image|>"),
        video_start_token_id=id_of("<|begin_of_video|>"),
        video_end_token_id=id_of("<|end_of_video|>"))
    generator = torch.Generator().manual_seed(seed)

    def values(*shape):
        """As large as after training: transformers' own would make all logits nearly equal."""
        scale = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return torch.randn(shape, generator=generator) * scale + (len(shape) == 1)

    model = GlmOcrForConditionalGeneration(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(values(*p.shape))
    model.save_pretrained(folder, max_shard_size=shard)
    if mtp:
        head = {name.split("layers.1.")[1]: values(*p.shape)
                for name, p in model.named_parameters() if "language_model.layers.1." in name}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            head[f"{name}.weight"] = values(width)
        head["eh_proj.weight"] = values(width, 2 * width)
        for name in ("embed_tokens", "shared_head.head"):
            head[f"{name}.weight"] = values(768, width)
        head = {f"model.language_model.layers.2.{name}": value for name, value in head.items()}
        save_file(head, folder / "mtp.safetensors", {"format": "pt"})
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(head, "mtp.safetensors")
        path.write_text(json.dumps(index), encoding="utf-8")
    return model.eval()
