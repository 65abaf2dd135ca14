// An answer as it is generated: go run ./examples/stream
package main

import (
	"context"
	"fmt"
	"log"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

func main() {
	client, err := tidewright.New(tidewright.Options{})
	if err != nil {
		log.Fatal(err)
	}
	stream, err := client.StreamChat(context.Background(), tidewright.ChatRequest{
		Model:     "smollm2-135m",
		Messages:  []tidewright.Message{tidewright.User("Name three fruits.")},
		MaxTokens: 32,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	for event, err := range stream.Events() {
		if err != nil {
			log.Fatal(err)
		}
		if text, ok := event.(tidewright.Text); ok {
			fmt.Print(text)
		}
	}
	fmt.Printf("\n%d tokens\n", stream.Answer().Usage.TotalTokens)
}
