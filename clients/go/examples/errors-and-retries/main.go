// What can go wrong, and what to do: go run ./examples/errors-and-retries
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"time"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

func main() {
	// Overload and broken connections are retried while nothing of the answer has come.
	client, err := tidewright.New(tidewright.Options{MaxRetries: 4, Timeout: time.Minute})
	if err != nil {
		log.Fatal(err)
	}
	answer, err := client.Chat(context.Background(), tidewright.ChatRequest{
		Model:     "gpt-9",
		Messages:  []tidewright.Message{tidewright.User("Name three fruits.")},
		MaxTokens: 32,
	})
	var failed *tidewright.Error
	switch {
	case err == nil:
		fmt.Println(answer.Text)
	case errors.Is(err, tidewright.ErrNotFound):
		fmt.Println("no such model:", err)
	case errors.Is(err, tidewright.ErrRateLimited) && errors.As(err, &failed):
		fmt.Println("ask again in", failed.RetryAfter)
	case errors.Is(err, tidewright.ErrTimedOut), errors.Is(err, tidewright.ErrUnavailable):
		fmt.Println("busy: ask again later")
	default:
		log.Fatal(err) // says what to change
	}
}
