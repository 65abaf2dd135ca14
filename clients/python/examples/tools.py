"""The model calls a function and answers with its result: python examples/tools.py"""

from tidewright_client import Client

parameters = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
weather = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather in a city", "parameters": parameters},
}

with Client(model="smollm2-135m") as client:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    extra = {"parallel_tool_calls": False}
    answer = client.chat(messages, tools=[weather], tool_choice="required", max_tokens=64, extra=extra)
    messages.append(answer.message())
    for call in answer.tool_calls:
        print(f"{call.name}({call.parsed()})")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"})
    print(client.chat(messages, max_tokens=32).text)
