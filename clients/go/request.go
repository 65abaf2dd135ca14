package tidewright

import (
	"encoding/json"
	"time"
)

// ChatRequest asks for the next message of a chat. Fields that are left out take the server's defaults.
type ChatRequest struct {
	// Model is required; [Client.Models] lists those that are served.
	Model    string
	Messages []Message
	// Tools are the functions that the model may call.
	Tools []Tool

	// MaxTokens of the answer. 0: the rest of the model's context.
	MaxTokens int
	// Temperature of sampling; Ptr(0.0) is greedy. nil: 1.
	Temperature *float64
	TopP        *float64
	// Stop ends the answer before any of these texts.
	Stop []string
	// Seed makes sampling repeatable.
	Seed *int64

	// Timeout of this call in place of Options.Timeout.
	Timeout time.Duration
	// Extra holds all other fields of the gateway's API, such as "response_format", "tool_choice" or "guided_regex".
	// They are sent unchanged and win over those above. "stream" and "n" have no place here: a call gives one answer.
	Extra map[string]any
}

// CompletionRequest asks for the continuation of a text. The fields are those of [ChatRequest].
type CompletionRequest struct {
	Model  string
	Prompt string

	// MaxTokens of the answer. 0: the server's default, which is 16 here.
	MaxTokens   int
	Temperature *float64
	TopP        *float64
	Stop        []string
	Seed        *int64

	Timeout time.Duration
	Extra   map[string]any
}

// Message is one turn of a chat. [System], [User], [Assistant], [ToolResult] and [Answer.Message] make them.
type Message struct {
	Role    string
	Content string
	// ToolCalls are the calls that a message of the assistant asked for.
	ToolCalls []ToolCall
	// ToolCallID names the call that a message of the role "tool" is the result of.
	ToolCallID string
}

// System is a message with instructions.
func System(content string) Message { return Message{Role: "system", Content: content} }

// User is a message of the user.
func User(content string) Message { return Message{Role: "user", Content: content} }

// Assistant is an earlier answer of the model.
func Assistant(content string) Message { return Message{Role: "assistant", Content: content} }

// ToolResult is what a function returned; id is that of the [ToolCall].
func ToolResult(id, content string) Message {
	return Message{Role: "tool", Content: content, ToolCallID: id}
}

// MarshalJSON writes the message as the API has it.
func (m Message) MarshalJSON() ([]byte, error) {
	type function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"`
	}
	type call struct {
		ID       string   `json:"id"`
		Type     string   `json:"type"`
		Function function `json:"function"`
	}
	var calls []call
	for _, one := range m.ToolCalls {
		calls = append(calls, call{one.ID, "function", function{one.Name, one.Arguments}})
	}
	return json.Marshal(struct {
		Role       string `json:"role"`
		Content    string `json:"content"`
		ToolCalls  []call `json:"tool_calls,omitempty"`
		ToolCallID string `json:"tool_call_id,omitempty"`
	}{m.Role, m.Content, calls, m.ToolCallID})
}

// Tool is a function that the model may call.
type Tool struct {
	Name        string
	Description string
	// Parameters is a JSON schema of an object: a map, a struct or a json.RawMessage. nil: no parameters.
	Parameters any
	// Strict makes the arguments follow the schema exactly.
	Strict bool
}

// MarshalJSON writes the tool as the API has it.
func (t Tool) MarshalJSON() ([]byte, error) {
	function := map[string]any{"name": t.Name}
	if t.Description != "" {
		function["description"] = t.Description
	}
	if t.Parameters != nil {
		function["parameters"] = t.Parameters
	}
	if t.Strict {
		function["strict"] = true
	}
	return json.Marshal(map[string]any{"type": "function", "function": function})
}

// Ptr makes a pointer to a value, for optional fields: Temperature: tidewright.Ptr(0.2).
func Ptr[T any](value T) *T { return &value }

func (r ChatRequest) fields(isStream bool) (map[string]any, error) {
	made := map[string]any{"messages": r.Messages}
	if len(r.Messages) == 0 {
		return nil, &Error{Kind: ErrInvalidRequest, Param: "messages", Message: "Messages is empty"}
	}
	if len(r.Tools) > 0 {
		made["tools"] = r.Tools
	}
	sampling := sampling{r.MaxTokens, r.Temperature, r.TopP, r.Stop, r.Seed}
	return made, complete(made, r.Model, sampling, r.Extra, isStream)
}

func (r CompletionRequest) fields(isStream bool) (map[string]any, error) {
	made := map[string]any{"prompt": r.Prompt}
	sampling := sampling{r.MaxTokens, r.Temperature, r.TopP, r.Stop, r.Seed}
	return made, complete(made, r.Model, sampling, r.Extra, isStream)
}

// sampling is what both requests share.
type sampling struct {
	maxTokens   int
	temperature *float64
	topP        *float64
	stop        []string
	seed        *int64
}

// complete adds the fields that both requests have.
func complete(made map[string]any, model string, s sampling, extra map[string]any, isStream bool) error {
	made["model"] = model
	if s.maxTokens != 0 {
		made["max_tokens"] = s.maxTokens
	}
	if s.temperature != nil {
		made["temperature"] = *s.temperature
	}
	if s.topP != nil {
		made["top_p"] = *s.topP
	}
	if len(s.stop) > 0 {
		made["stop"] = s.stop
	}
	if s.seed != nil {
		made["seed"] = *s.seed
	}
	if isStream {
		made["stream"] = true
		made["stream_options"] = map[string]any{"include_usage": true}
	}
	for name, value := range extra {
		switch name {
		case "stream":
			return &Error{Kind: ErrInvalidRequest, Param: name,
				Message: `Extra may not have "stream": StreamChat and StreamComplete stream, Chat and Complete do not`}
		case "n":
			return &Error{Kind: ErrInvalidRequest, Param: name,
				Message: `Extra may not have "n": a call gives one answer; make as many calls`}
		}
		made[name] = value
	}
	if made["model"] == "" {
		return &Error{Kind: ErrInvalidRequest, Param: "model", Message: "Model is empty; Client.Models lists those served"}
	}
	return nil
}
