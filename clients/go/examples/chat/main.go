// A whole answer: go run ./examples/chat
package main

import (
	"context"
	"fmt"
	"log"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

func main() {
	client, err := tidewright.New(tidewright.Options{}) // TIDEWRIGHT_URL and TIDEWRIGHT_KEY
	if err != nil {
		log.Fatal(err)
	}
	answer, err := client.Chat(context.Background(), tidewright.ChatRequest{
		Model:     "smollm2-135m",
		Messages:  []tidewright.Message{tidewright.System("Be short."), tidewright.User("Name three fruits.")},
		MaxTokens: 32,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Text)
	fmt.Println(answer.FinishReason, answer.Usage.TotalTokens, "tokens")
}
