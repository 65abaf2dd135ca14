module github.com/tidewright/tidewright/clients/go

go 1.23
