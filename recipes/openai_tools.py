"""OpenAI's client plays a form with tools, as agent frameworks do; `pip install openai`.

    python serve.py --ckpt=ckpt/demo                    in another terminal
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=any python -m recipes.openai_tools
"""
import json
import sys

import openai

from recipes.form_game import FormGame, SCHEMAS

TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}}
         for name, schema in SCHEMAS.items()]


def screen(game) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{game.screen}"}}


def play(seed: int = 0) -> float:
    """Play one task to its end -> the reward."""
    client, game = openai.OpenAI(), FormGame(seed)
    messages = [{"role": "user", "content": [{"type": "text", "text": game.goal}, screen(game)]}]
    while not game.over:
        reply = client.chat.completions.create(model="nanoglm-v", messages=messages, tools=TOOLS)
        messages.append(said := reply.choices[0].message)
        for call in said.tool_calls or []:
            game.call(call.function.name, json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "clicked"})
        if not said.tool_calls:
            game.take(said.content or "")
        if not game.over:           # results are only text in this protocol
            messages.append({"role": "user", "content": [screen(game)]})
    return game.reward


if __name__ == "__main__":
    play(*map(int, sys.argv[1:2]))
