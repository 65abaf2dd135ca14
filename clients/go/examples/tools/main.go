// The model calls a function and answers with its result: go run ./examples/tools
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

func main() {
	client, err := tidewright.New(tidewright.Options{})
	if err != nil {
		log.Fatal(err)
	}
	weather := tidewright.Tool{
		Name:        "get_weather",
		Description: "The weather in a city",
		Parameters: json.RawMessage(`{"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}},
			"required": ["city"]}`),
	}
	question := "What is the weather in Paris?"
	fmt.Println(question) // the answer takes a moment
	messages := []tidewright.Message{tidewright.User(question)}
	answer, err := client.Chat(context.Background(), tidewright.ChatRequest{
		Model:     "smollm2-135m",
		Messages:  messages,
		Tools:     []tidewright.Tool{weather},
		MaxTokens: 64,
		Extra:     map[string]any{"tool_choice": "required", "parallel_tool_calls": false},
	})
	if err != nil {
		log.Fatal(err)
	}
	messages = append(messages, answer.Message())
	for _, call := range answer.ToolCalls {
		fmt.Printf("%s(%s)\n", call.Name, call.Arguments)
		messages = append(messages, tidewright.ToolResult(call.ID, "18 degrees, sunny"))
	}
	answer, err = client.Chat(context.Background(), tidewright.ChatRequest{
		Model:     "smollm2-135m",
		Messages:  messages,
		MaxTokens: 32,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Text)
}
