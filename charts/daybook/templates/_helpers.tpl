{{- define "daybook.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "daybook.labels" -}}
app.kubernetes.io/name: daybook
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "daybook.account" -}}
{{- .Values.serviceAccount.name | default (include "daybook.name" .) -}}
{{- end }}

{{- define "daybook.image" -}}
{{- $image := .Values.image -}}
{{- required "image.repository: where is the image of Daybook?" $image.repository -}}
{{- with $image.tag }}:{{ . }}{{ end -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end }}

{{- define "daybook.nats" -}}
{{- if .Values.nats.server.enabled -}}
nats://{{ include "daybook.name" . }}-nats:4222
{{- else -}}
{{- required "nats.url: give a NATS of your own, or set nats.server.enabled" .Values.nats.url -}}
{{- end -}}
{{- end }}

{{- define "daybook.claim" -}}
{{- .Values.data.existingClaim | default (printf "%s-data" (include "daybook.name" .)) -}}
{{- end }}

{{/* What no container of this chart needs. */}}
{{- define "daybook.restricted" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
