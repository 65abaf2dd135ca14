package tidewright

import (
	"bytes"
	"encoding/json"
)

// wireAnswer is a whole answer or a part of a stream, of chats and completions. What it does not name is ignored.
type wireAnswer struct {
	Error    json.RawMessage `json:"error"`
	Model    string          `json:"model"`
	ServedBy string          `json:"served_by"`
	Choices  []wireChoice    `json:"choices"`
	Usage    *Usage          `json:"usage"`
}

type wireChoice struct {
	Index        int         `json:"index"`
	Text         string      `json:"text"`    // of completions
	Message      wireMessage `json:"message"` // of whole chats
	Delta        wireMessage `json:"delta"`   // of streamed chats
	FinishReason string      `json:"finish_reason"`
	EndedBy      string      `json:"ended_by"`
}

type wireMessage struct {
	Content   string     `json:"content"`
	ToolCalls []wireCall `json:"tool_calls"`
}

type wireCall struct {
	Index    int    `json:"index"`
	ID       string `json:"id"`
	Function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"`
	} `json:"function"`
}

type wireError struct {
	Message string          `json:"message"`
	Type    string          `json:"type"`
	Param   string          `json:"param"`
	Code    json.RawMessage `json:"code"` // others than the gateway have numbers here
}

func (c wireCall) event(index int) ToolCall {
	return ToolCall{index, c.ID, c.Function.Name, c.Function.Arguments}
}

// events of a part of a stream, in the order in which they count.
func (w *wireAnswer) events() []Event {
	var found []Event
	for _, choice := range w.Choices {
		if choice.Index != 0 {
			continue // a call gives one answer
		}
		if text := choice.Delta.Content + choice.Text; text != "" {
			found = append(found, Text(text))
		}
		for _, call := range choice.Delta.ToolCalls {
			found = append(found, call.event(call.Index))
		}
		if choice.FinishReason != "" {
			found = append(found, Finish{choice.FinishReason, choice.EndedBy})
		}
	}
	if w.Usage != nil {
		found = append(found, UsageReport{*w.Usage})
	}
	return found
}

// whole is the answer without what the headers say.
func (w *wireAnswer) whole() *Answer {
	choice := w.Choices[0]
	made := &Answer{
		Text:         choice.Message.Content + choice.Text,
		FinishReason: choice.FinishReason,
		EndedBy:      choice.EndedBy,
		ServedBy:     w.ServedBy,
		Model:        w.Model,
	}
	for index, call := range choice.Message.ToolCalls {
		made.ToolCalls = append(made.ToolCalls, call.event(index))
	}
	if w.Usage != nil {
		made.Usage = *w.Usage
	}
	return made
}

// errorOf reads the API's error object; false if it is none.
func errorOf(raw json.RawMessage) (wireError, bool) {
	var found wireError
	if len(raw) == 0 || bytes.Equal(raw, []byte("null")) || json.Unmarshal(raw, &found) != nil {
		return found, false
	}
	return found, found.Message != "" || found.Type != "" || found.code() != ""
}

func (e wireError) code() string {
	var text string
	if json.Unmarshal(e.Code, &text) == nil {
		return text
	}
	return string(e.Code)
}
