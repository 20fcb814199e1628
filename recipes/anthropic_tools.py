"""Anthropic's client plays a form with tools, as agent frameworks do; `pip install anthropic`.

    python serve.py --ckpt=ckpt/demo                    in another terminal
    ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_API_KEY=any python -m recipes.anthropic_tools
"""
import sys

import anthropic

from recipes.form_game import FormGame, SCHEMAS

TOOLS = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]


def screen(game) -> list:
    source = {"type": "base64", "media_type": "image/png", "data": game.screen}
    return [] if game.over else [{"type": "image", "source": source}]


def play(seed: int = 0) -> float:
    """Play one task to its end -> the reward."""
    client, game = anthropic.Anthropic(), FormGame(seed)
    content, messages = [{"type": "text", "text": game.goal}, *screen(game)], []
    while not game.over:
        messages.append({"role": "user", "content": content})
        reply = client.messages.create(model="nanoglm-v", max_tokens=64, tools=TOOLS,
                                       messages=messages)
        messages.append({"role": "assistant", "content": reply.content})
        calls, content = [part for part in reply.content if part.type == "tool_use"], []
        for call in calls:
            game.call(call.name, call.input)
            content += [{"type": "tool_result", "tool_use_id": call.id, "content": screen(game)}]
        if not calls:
            game.take("".join(part.text for part in reply.content))
            content = screen(game)
    return game.reward


if __name__ == "__main__":
    play(*map(int, sys.argv[1:2]))
