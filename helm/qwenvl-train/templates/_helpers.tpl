{{- define "qwenvl.labels" -}}
app.kubernetes.io/name: qwenvl-train
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: qwenvl-train
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "qwenvl.mlflow.selector" -}}
app.kubernetes.io/name: qwenvl-train
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: mlflow
{{- end -}}

{{/* Host headers that MLflow answers: the Service's names, with and without port, and what people use. */}}
{{- define "qwenvl.mlflow.hosts" -}}
{{- $service := printf "%s-mlflow" .Values.name -}}
{{- $port := .Values.mlflow.service.port -}}
{{- $hosts := list -}}
{{- range $host := list $service (printf "%s.%s" $service .Release.Namespace) (printf "%s.%s.svc" $service .Release.Namespace) (printf "%s.%s.svc.*" $service .Release.Namespace) "localhost" "127.0.0.1" -}}
{{- $hosts = concat $hosts (list $host (printf "%s:%v" $host $port)) -}}
{{- end -}}
{{- join "," (concat $hosts .Values.mlflow.allowedHosts) -}}
{{- end -}}
