// Leaving a stream ends it in the server too: go run ./examples/cancel
package main

import (
	"context"
	"fmt"
	"log"
	"time"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

func main() {
	client, err := tidewright.New(tidewright.Options{})
	if err != nil {
		log.Fatal(err)
	}
	// The end of the context, of the loop and stream.Close all close the connection: the server stops within two steps.
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	stream, err := client.StreamChat(ctx, tidewright.ChatRequest{
		Model:     "smollm2-135m",
		Messages:  []tidewright.Message{tidewright.User("Count to a thousand.")},
		MaxTokens: 1000,
	})
	if err != nil {
		log.Fatal(err)
	}
	defer stream.Close()
	for _, err := range stream.Events() {
		if err != nil {
			log.Fatal(err)
		}
		if len(stream.Answer().Text) > 20 {
			break
		}
	}
	fmt.Println(stream.Answer().Text, "...")
}
