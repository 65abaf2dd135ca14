// Package tidewright calls a Tidewright gateway: chats and completions, whole or streamed.
//
// A [Client] is made once and shared by all goroutines. Its calls take a context, which cancels them, and return an
// [Answer] or a [Stream] of events:
//
//	client, err := tidewright.New(tidewright.Options{})
//	...
//	stream, err := client.StreamChat(ctx, tidewright.ChatRequest{
//		Model:    "smollm2-135m",
//		Messages: []tidewright.Message{tidewright.User("Name three fruits.")},
//	})
//	...
//	defer stream.Close()
//	for event, err := range stream.Events() {
//		if err != nil {
//			return err
//		}
//		if text, ok := event.(tidewright.Text); ok {
//			fmt.Print(text)
//		}
//	}
//	fmt.Println(stream.Answer().Usage.TotalTokens)
//
// # Errors
//
// Every error is an [*Error]. What happened is told by one of the values ErrInvalidRequest, ErrRateLimited and so on:
//
//	if errors.Is(err, tidewright.ErrRateLimited) { ... }
//
//	var failed *tidewright.Error
//	if errors.As(err, &failed) {
//		log.Print(failed.Status, failed.Code, failed.RequestID)
//	}
//
// A call whose context was cancelled fails with context.Canceled; errors.Is finds that as well.
//
// # Retries and timeouts
//
// A request that failed before the first byte of its answer is sent again, [Options].MaxRetries times at most, and only
// while the client's budget of retries lasts, so that an outage is not multiplied. A call, its retries included, takes
// Options.Timeout at most, or as long as its context allows, whichever ends first. The server is told the time that is
// left and ends by itself a little before that, with what it has: then Answer.EndedBy is "timeout". If it is overloaded,
// ErrTimedOut may come first.
package tidewright
