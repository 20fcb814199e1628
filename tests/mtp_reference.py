"""The multi-token-prediction forward, worked out a second time from PAPER.md (section 2) alone.

Nothing of the project is imported. Everything is float64, one document at a time, with loops over
heads and slots: it is there to be read and compared against, not to be quick.
[C] is what the paper says, [R] what the released GLM-OCR and DeepSeek-V3's module do.
"""
import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotate(x, position, sections, theta):
    """Turn one head's vector x at position (t, h, w); pair j is elements 2j and 2j + 1 [R]."""
    axis = [a for a, size in enumerate(sections) for _ in range(size)]  # contiguous blocks
    assert 2 * len(axis) == len(x), "the sections must cover the whole head"
    angle = torch.stack([position[a] * theta ** (-2 * j / len(x)) for j, a in enumerate(axis)])
    cos, sin, even, odd = angle.cos(), angle.sin(), x[0::2], x[1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten()


def attention(x, part, positions, heads, groups, width, sections, theta):
    """Causal attention; heads // groups neighbouring query heads share one key-value head."""
    q = (x @ part("self_attn.q_proj").T).view(len(x), heads, width)
    k = (x @ part("self_attn.k_proj").T).view(len(x), groups, width)
    v = (x @ part("self_attn.v_proj").T).view(len(x), groups, width)
    out = torch.zeros_like(q)
    for head in range(heads):
        g = head // (heads // groups)
        keys = [rotate(k[j, g], positions[:, j], sections, theta) for j in range(len(x))]
        for i in range(len(x)):
            query = rotate(q[i, head], positions[:, i], sections, theta)
            score = torch.stack([query @ key for key in keys[:i + 1]]) / width ** 0.5
            out[i, head] = score.softmax(0) @ v[:i + 1, g]
    return out.flatten(1) @ part("self_attn.o_proj").T


def reference(tensors, hidden, tokens, positions, depths, *,
              layer, heads, groups, width, sections, theta, eps):
    """[(state, logits)] for k = 1..depths, on the slots i = 0..T-1-k for which t_{i+k} exists.

    hidden (T, W) is the trunk's output after its last norm; tokens (T,) holds the <|image|> id at
    every visual slot (option 3 [C]); positions (3, T) is (t, h, w). state (T-k, W) is the layer's
    output before shared_head.norm and goes on to the next depth as it is; logits (T-k, V) predict
    token i+k+1. One layer serves all depths [C]; embedding and head are the trunk's own.
    """
    embed = tensors["model.language_model.embed_tokens.weight"].double()
    lm_head = tensors["lm_head.weight"].double()

    def part(name):
        return tensors[f"model.language_model.layers.{layer}.{name}.weight"].double()

    def norm(x, name):
        return rms_norm(x, part(name), eps)

    shape = heads, groups, width, sections, theta
    state, answer = hidden.double(), []
    for k in range(1, depths + 1):
        ahead = embed[tokens[k:]]  # slot i reads t_{i+k}, and keeps its own position i
        where = positions[:, :len(ahead)].double()
        ahead[(where == 0).all(0)] = 0  # position 0 embeds to zero [R]
        both = torch.cat([norm(ahead, "enorm"), norm(state[:len(ahead)], "hnorm")], -1)
        x = both @ part("eh_proj").T
        a = attention(norm(x, "input_layernorm"), part, where, *shape)
        x = x + norm(a, "post_self_attn_layernorm")
        gate, up = (norm(x, "post_attention_layernorm") @ part("mlp.gate_up_proj").T).chunk(2, -1)
        mlp = (gate * gate.sigmoid() * up) @ part("mlp.down_proj").T
        state = x + norm(mlp, "post_mlp_layernorm")
        answer.append((state, norm(state, "shared_head.norm") @ lm_head.T))
    return answer
