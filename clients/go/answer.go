package tidewright

import "strings"

// Answer is what the model said.
type Answer struct {
	Text string
	// ToolCalls are the functions to call. Their Arguments are JSON, unless the answer was cut short.
	ToolCalls []ToolCall
	// FinishReason is "stop", "length", "tool_calls", or another word of the server.
	FinishReason string
	// EndedBy says more where the server itself ended the answer, as "timeout".
	EndedBy string
	Usage   Usage
	// RequestID finds the request in the gateway's logs.
	RequestID string
	// ServedBy is "decoder", or "fallback" under trouble.
	ServedBy string
	Model    string
}

// Usage counts tokens.
type Usage struct {
	PromptTokens     int `json:"prompt_tokens"`
	CompletionTokens int `json:"completion_tokens"`
	TotalTokens      int `json:"total_tokens"`
}

// Message is the answer as a message of the chat, to go on with.
func (a *Answer) Message() Message {
	return Message{Role: "assistant", Content: a.Text, ToolCalls: a.ToolCalls}
}

// Event is a part of a stream: [Text], [ToolCall], [Finish] or [UsageReport].
type Event interface{ isEvent() }

// Text is the next part of the answer's text; never empty, and never a part of a character.
type Text string

// ToolCall is a call of a function, of which a stream gives parts: ID and Name come with the first one of an Index, and
// the Arguments of all of them join to JSON. In an [Answer] they are whole.
type ToolCall struct {
	Index     int
	ID        string
	Name      string
	Arguments string
}

// Finish ends the answer and says why.
type Finish struct {
	Reason string
	// EndedBy is as in [Answer].
	EndedBy string
}

// UsageReport counts the tokens. It comes last.
type UsageReport struct{ Usage Usage }

func (Text) isEvent()        {}
func (ToolCall) isEvent()    {}
func (Finish) isEvent()      {}
func (UsageReport) isEvent() {}

// builder adds events up to an answer.
type builder struct {
	answer  Answer
	text    strings.Builder
	calls   []*partialCall
	byIndex map[int]*partialCall
	size    int64 // bytes that are kept
}

// partialCall is in the order in which its index first came.
type partialCall struct {
	call      ToolCall
	arguments strings.Builder
}

func (b *builder) add(event Event) {
	switch event := event.(type) {
	case Text:
		b.text.WriteString(string(event))
		b.size += int64(len(event))
	case ToolCall:
		one := b.callOf(event.Index)
		if event.ID != "" {
			one.call.ID = event.ID
		}
		if event.Name != "" {
			one.call.Name = event.Name
		}
		one.arguments.WriteString(event.Arguments)
		b.size += int64(len(event.ID) + len(event.Name) + len(event.Arguments))
	case Finish:
		b.answer.FinishReason, b.answer.EndedBy = event.Reason, event.EndedBy
	case UsageReport:
		b.answer.Usage = event.Usage
	}
}

func (b *builder) callOf(index int) *partialCall {
	if one := b.byIndex[index]; one != nil {
		return one
	}
	if b.byIndex == nil {
		b.byIndex = map[int]*partialCall{}
	}
	one := &partialCall{call: ToolCall{Index: index}}
	b.calls = append(b.calls, one)
	b.byIndex[index] = one
	b.size += callSize
	return one
}

// callSize is what a call takes beside its texts, so that empty ones are bounded as well.
const callSize = 64

func (b *builder) built() *Answer {
	made := b.answer
	made.Text = b.text.String()
	for _, one := range b.calls {
		call := one.call
		call.Arguments = one.arguments.String()
		made.ToolCalls = append(made.ToolCalls, call)
	}
	return &made
}
