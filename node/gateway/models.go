package gateway

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"

	"github.com/dsnode/dsnode/node/serving"
)

type model struct {
	ID      string `json:"id"`
	Object  string `json:"object"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

// describe gives the gateway's start as the time of creation: the configuration has
// none.
func (g *Gateway) describe(name string) model {
	return model{name, "model", g.started.Unix(), "dsnode"}
}

func (x *exchange) reader() (serving.Principal, bool) {
	x.identify()
	who, _, f := x.authenticate()
	if f != nil {
		x.refuse(f)
	}
	return who, f == nil
}

// listModels is GET /v1/models. It lists the models that the key may use.
func (x *exchange) listModels(string) {
	who, ok := x.reader()
	if !ok {
		return
	}
	list := struct {
		Object string  `json:"object"`
		Data   []model `json:"data"`
	}{"list", []model{}}
	for _, name := range slices.Sorted(maps.Keys(x.g.config().Models)) {
		if who.Allows(name) {
			list.Data = append(list.Data, x.g.describe(name))
		}
	}
	x.reply(http.StatusOK, list)
}

func (x *exchange) showModel(id string) {
	who, ok := x.reader()
	if !ok {
		return
	}
	if _, known := x.g.config().Models[id]; !known || !who.Allows(id) {
		x.refuse(unknownModel(id))
		return
	}
	x.reply(http.StatusOK, x.g.describe(id))
}

// reply sends a small JSON document.
func (x *exchange) reply(status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // only types of this package come here
		panic(err)
	}
	x.w.Header()["Content-Type"] = jsonType
	x.w.WriteHeader(status)
	if x.r.Method != http.MethodHead {
		_, _ = x.w.Write(b) // a client that has gone can't be told
	}
}
