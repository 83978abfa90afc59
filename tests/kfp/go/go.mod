// What tests/kfp/programs.py builds: the versions; go.sum has their digests. The modules' own go.mod and go.sum pin what
// they need.
module qwenvl-train/tests/kfp

go 1.24

require (
	github.com/argoproj/argo-workflows/v3 v3.7.14
	github.com/kubeflow/pipelines v0.0.0-20250902140602-fc3214d4b4d3 // the tag 2.14.3
	github.com/kubeflow/pipelines/api v0.0.0-20250102152816-873e9dedd766
)
