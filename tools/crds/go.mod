// The custom resource definitions that tests install, as they are published.
module daybook.dev/crds

go 1.26.0

require (
	github.com/argoproj/argo-cd/v3 v3.5.7
	sigs.k8s.io/external-dns v0.21.0
	sigs.k8s.io/gateway-api v1.6.3
)
