package datakeys

import (
	"fmt"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/storage/keyring"
)

// NewClusterKey makes the key that signs members' tickets, sealed with the operator key of
// that fingerprint; "": the current one.
func (o OperatorKeys) NewClusterKey(clusterID, operatorKey string) (agreed.ClusterKey, error) {
	return o.seal(keyring.NewClusterKey(), clusterID, operatorKey)
}

// ResealClusterKey seals the cluster key with another operator key.
func (o OperatorKeys) ResealClusterKey(clusterID string, k agreed.ClusterKey, operatorKey string) (agreed.ClusterKey, error) {
	key, err := o.open(clusterID, k)
	if err != nil {
		return agreed.ClusterKey{}, err
	}
	return o.seal(key, clusterID, operatorKey)
}

// SignTicket signs with the cluster key.
func (o OperatorKeys) SignTicket(clusterID string, k agreed.ClusterKey, text []byte) ([]byte, error) {
	key, err := o.open(clusterID, k)
	if err != nil {
		return nil, err
	}
	return key.Sign(text), nil
}

func (o OperatorKeys) seal(k keyring.ClusterKey, clusterID, operatorKey string) (agreed.ClusterKey, error) {
	op := o.Current
	if operatorKey != "" {
		var ok bool
		if op, ok = o.byFingerprint(operatorKey); !ok {
			return agreed.ClusterKey{}, fmt.Errorf("seal the cluster key: %w: this node has no operator key %s", agreed.ErrOperatorKey, operatorKey)
		}
	}
	sealed, err := k.Wrap(op, clusterID)
	if err != nil {
		return agreed.ClusterKey{}, err
	}
	return agreed.ClusterKey{Public: k.Public(), Sealed: sealed, OperatorKey: op.Fingerprint()}, nil
}

func (o OperatorKeys) open(clusterID string, k agreed.ClusterKey) (keyring.ClusterKey, error) {
	op, ok := o.byFingerprint(k.OperatorKey)
	if !ok {
		return keyring.ClusterKey{}, fmt.Errorf("open the cluster key: %w: it is sealed with operator key %s, which this node does not have", agreed.ErrOperatorKey, k.OperatorKey)
	}
	return keyring.UnwrapClusterKey(op, clusterID, k.Public, k.Sealed)
}
