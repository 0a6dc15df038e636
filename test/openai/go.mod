module github.com/dsnode/dsnode/test/openai

go 1.26.0

require (
	github.com/dsnode/dsnode v0.0.0
	github.com/openai/openai-go/v3 v3.0.0
)

replace github.com/dsnode/dsnode => ../..
